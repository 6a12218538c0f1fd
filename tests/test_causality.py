"""A model whose tokens see those behind them is no subject."""

import pytest
import torch
from tiny_models import FAMILIES, ROTARY, UNUSUAL, tiny_model
from transformers import AutoModelForCausalLM, BertConfig

from consistency_lens.causality import check_causal


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_causal_family_passes(family, dtype):
    check_causal(tiny_model(family).to(dtype), family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_language_model_is_refused_by_its_name(dtype):
    model = AutoModelForCausalLM.from_config(BertConfig(**ROTARY)).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.18)
    with pytest.raises(ValueError, match=r"'bert' \(BertLMHeadModel\) see those behind them, got first") as failed:
        check_causal(model, "bert")
    assert "\n" not in str(failed.value)
