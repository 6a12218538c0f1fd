import pytest
import torch
from tiny_models import FAMILIES, GROUPED, POSITIONS, WIDTH, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PreTrainedModel

from consistency_lens.residual_stream import ResidualStream
from consistency_lens.tuned_lens.readout import Readout

# families whose logits are scaled, and heads that are not tied, biased or behind a projection
SCALED = {
    "cohere": (CohereConfig, {**GROUPED, "logit_scale": 0.3}),
    "granite": (GraniteConfig, {**GROUPED, "logits_scaling": 4.0}),
}
VARIANTS = {
    "untied gpt2": ("gpt2", {"tie_word_embeddings": False}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "soft-capped gemma2": ("gemma2", {"final_logit_softcapping": 2.0}),
    "post-norm opt": (
        "opt",
        {**POSITIONS, "ffn_dim": 48, "do_layer_norm_before": False, "word_embed_proj_dim": WIDTH // 2},
    ),
}


def model_named(name: str) -> PreTrainedModel:
    if name in SCALED:
        config_class, arguments = SCALED[name]
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_class(**arguments)).eval()
    family, overrides = VARIANTS.get(name, (name, {}))
    return tiny_model(family, **overrides)


@pytest.mark.parametrize("name", [*FAMILIES, *SCALED, *VARIANTS])
@torch.no_grad()
def test_norm_and_head_of_the_last_residual_are_the_logits(name):
    model = model_named(name)
    readout, stream = Readout(model), ResidualStream(model)
    ids, mask = random_tokens(12, 7)
    with stream.capture(stream.num_layers - 1) as captured:
        logits = model(input_ids=ids, attention_mask=mask).logits
    found = readout.logits(readout.normalise(captured.activations))
    torch.testing.assert_close(found[mask.bool()], logits[mask.bool()], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_model_in_half_precision_is_read_in_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    whole = tiny_model("llama").to(torch.bfloat16).float()
    residual = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found, expected = (Readout(m).logits(Readout(m).normalise(residual)) for m in (model, whole))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_weights_in_float32_are_not_copied():
    model = tiny_model("llama")
    assert Readout(model).weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no unembedding"):
        Readout(tiny_model("llama").model)


def test_a_head_that_does_something_else_is_refused():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.sigmoid())
    with pytest.raises(ValueError, match="this architecture is not supported"):
        Readout(model)
