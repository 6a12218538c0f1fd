"""Attention to a context that stays where it is, against new keys and values that are appended to it."""

import importlib.util

import pytest
import torch
from test_subject import LAYER, ONE_TOKEN_CASES, kl_and_gradient, new_activations, ragged_inputs
from tiny_models import FAMILIES, random_tokens, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from consistency_lens import context_attention
from consistency_lens.context_attention import NAME
from consistency_lens.subject import Subject

# Their attention is their own code, which transformers does not exchange.
APPENDED = {"falcon", "gptj", "gpt_neo"}
LENGTH = 40


def is_in_use(subject, context):
    """Whether the replaced pass of a context runs this attention."""
    seen = []
    hook = subject.stream.blocks[-1].register_forward_hook(
        lambda *_: seen.append(subject.model.config.get_text_config()._attn_implementation)
    )
    subject.replaced_logits(context, context.activations)
    hook.remove()
    return seen == [NAME]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_it_is_in_use_wherever_transformers_exchanges_attention(family):
    subject = Subject(tiny_model(family), LAYER)
    context = subject.context(*ragged_inputs(1))
    assert context.cache is not None and is_in_use(subject, context) == (family not in APPENDED)
    appended = Subject(subject.model, LAYER, context_attention=False)
    assert not is_in_use(appended, appended.context(*ragged_inputs(1)))


@pytest.mark.parametrize("num_positions", [1, 3])
@pytest.mark.parametrize(("family", "overrides"), [case for case in ONE_TOKEN_CASES if case[0] not in APPENDED])
def test_kl_and_gradient_equal_those_of_an_appended_context(family, overrides, num_positions):
    model, found = tiny_model(family, **overrides), {}
    for used in (True, False):
        subject = Subject(model, LAYER, context_attention=used)
        context = subject.context(*ragged_inputs(num_positions))
        assert is_in_use(subject, context) == used
        found[used] = (context.logits, *kl_and_gradient(subject.replaced_logits, context, new_activations(context)))
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class LargeTensors(TorchDispatchMode):
    """Counts the tensors that are made with at least so many elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
                self.count += tensor.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("used", [True, False])
def test_neither_pass_makes_anything_of_the_size_of_a_context(used):
    # one key-value head, and a vocabulary, that are small beside the context
    subject = Subject(tiny_model("mistral", max_position_embeddings=512), LAYER, context_attention=used)
    context = subject.context(*random_tokens(400), torch.tensor([[399]]))
    size = min(keys.numel() for one_pass in context.cache for keys, _ in filter(None, one_pass))
    replacement = new_activations(context).requires_grad_()
    with LargeTensors(size) as made:
        subject.replaced_logits(context, replacement).square().sum().backward()
    assert (made.count == 0) == used


def test_the_attention_of_the_model_is_its_own_again_afterwards():
    subject = Subject(tiny_model("llama"), LAYER)
    context = subject.context(*ragged_inputs(1))
    usual = subject.model.config._attn_implementation
    subject.replaced_logits(context, context.activations)
    assert subject.model.config._attn_implementation == usual
    subject.stream.blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        subject.replaced_logits(context, context.activations)
    assert subject.model.config._attn_implementation == usual != NAME


def test_another_copy_of_the_code_takes_nothing_away():
    """As loading a published lens with the code beside it makes one."""
    spec = importlib.util.spec_from_file_location(f"{NAME}_of_an_artifact", context_attention.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    subject = Subject(tiny_model("llama"), LAYER)
    assert is_in_use(subject, subject.context(*ragged_inputs(1)))
