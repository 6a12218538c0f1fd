"""A model whose tokens see those behind them is no subject."""

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import FAMILIES, ROTARY, UNUSUAL, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, BertConfig

from consistency_lens.causality import check_causal
from consistency_lens.subject import Subject


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_causal_family_passes(family, dtype):
    check_causal(tiny_model(family).to(dtype), family)


def test_a_model_whose_weights_are_offloaded_passes_and_reads_one_token():
    """A device map may leave its table of embeddings elsewhere, too: what stands in its place has no device."""
    expected = Subject(tiny_model("llama"), 1)
    offloaded = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    assert offloaded.get_input_embeddings().weight.is_meta
    subject = Subject(offloaded, 1)
    assert subject.check_one_token(16)
    ids, mask = random_tokens(9, 7)
    found, wanted = (one.context(ids, mask, torch.tensor([[3], [6]])).logits for one in (subject, expected))
    torch.testing.assert_close(found, wanted)
    check_causal(offloaded, "offloaded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_language_model_is_refused_by_its_name(dtype):
    model = AutoModelForCausalLM.from_config(BertConfig(**ROTARY)).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.18)
    with pytest.raises(ValueError, match=r"'bert' \(BertLMHeadModel\) see those behind them, got first") as failed:
        check_causal(model, "bert")
    assert "\n" not in str(failed.value)
