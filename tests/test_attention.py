"""What runs FlashAttention and what must not, by a stand-in for it that refuses what it refuses."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from consistency_lens import Subject, attention
from consistency_lens.attention import attention_to_try, attention_with_masks, leave_flash
from consistency_lens.lens_clone import clone_subject

STAND_IN = "flash_stand_in"
ran: list[torch.dtype] = []


def refusing_attention(module, query, key, value, attention_mask, **arguments):
    if query.dtype == torch.float32 or (attention_mask is not None and attention_mask.ndim == 4):
        raise RuntimeError("FlashAttention takes no such thing")
    ran.append(query.dtype)
    assert attention_mask is None, "the tests that run this one pad nothing"
    return sdpa_attention_forward(module, query, key, value, None, **arguments)


@pytest.fixture
def flash_model(monkeypatch):
    # transformers would load the kernel of any flash attention that is set
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kwargs: None)
    AttentionInterface.register(STAND_IN, refusing_attention)
    AttentionMaskInterface.register(STAND_IN, flash_attention_mask)
    model = tiny_model("llama").bfloat16()
    model.set_attn_implementation(STAND_IN)
    ran.clear()
    return model


def test_auto_asks_for_flash_where_it_can_run(monkeypatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert attention_to_try("auto", "bfloat16", on_gpu=True) == ["flash_attention_2", None]
    assert attention_to_try("auto", "float32", on_gpu=True) == [None]
    assert attention_to_try("auto", "bfloat16", on_gpu=False) == [None]
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    assert attention_to_try("auto", "bfloat16", on_gpu=True) == [None]
    assert attention_to_try("eager", "bfloat16", on_gpu=True) == ["eager"]


def test_the_stand_in_refuses_4d_masks(flash_model):
    with pytest.raises(RuntimeError, match="no such thing"):
        flash_model(random_tokens(4)[0], attention_mask=torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("context_attention", [False, True])
def test_the_one_token_pass_of_a_subject_with_flash_attention(flash_model, context_attention):
    subject = Subject(flash_model, 1, context_attention=context_attention)
    # the self-check pads a row, which the stand-in cannot
    subject._checked_length = float("inf")
    ids, mask = random_tokens(12, 12)
    context = subject.context(ids, mask, torch.tensor([[3, 8], [11, 5]]))
    # of the whole pass, all blocks ran it but the last, where the pass ends with keys and values
    assert context.cache is not None and len(ran) == 2
    replacement = context.activations.roll(1, 0).requires_grad_()
    logits = subject.replaced_logits(context, replacement)
    assert len(ran) == 2 and flash_model.config._attn_implementation == STAND_IN
    expected = subject.replaced_logits_full(context, replacement)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(logits.float().sum(), replacement)[0].abs().sum() > 0


@pytest.mark.parametrize(("family", "expected"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_flash_is_left_for_the_best_that_the_architecture_has(flash_model, family, expected):
    model = tiny_model(family)
    model.set_attn_implementation(STAND_IN)
    with attention_with_masks(model):
        assert model.config._attn_implementation == expected
    assert model.config._attn_implementation == STAND_IN
    leave_flash(model)
    assert model.config._attn_implementation == expected


def test_another_attention_stays_as_it_is():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with attention_with_masks(model):
        assert model.config._attn_implementation == "eager"


def test_clones_in_full_precision_do_without_flash_attention(flash_model):
    shared, copied = (clone_subject(flash_model, share_weights=share) for share in (True, False))
    assert shared.config._attn_implementation == flash_model.config._attn_implementation == STAND_IN
    assert copied.config._attn_implementation == "sdpa"
    assert copied(random_tokens(5)[0]).logits.dtype == torch.float32
