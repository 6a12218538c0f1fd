"""Lenses over 8-bit and 4-bit subjects: whose weights are whose, gradients, and what is saved."""

import json

import pytest
import torch
from tiny_lenses import INJECTED, disturb, gradients, keys, tiny_tokenizer
from tiny_models import random_tokens, tiny_model
from transformers import BitsAndBytesConfig

from consistency_lens import ConsistencyLensModel, Subject
from consistency_lens.data.subject_loading import load_subject_and_tokenizer
from consistency_lens.lens_clone import clone_subject
from consistency_lens.losses import kl_divergence
from consistency_lens.training.objectives import freeze_copy

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.parametrize("quantization", ["8bit", "4bit"])

QUANTISED_LAYERS = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
# bitsandbytes reads its 4-bit blocks of 64 wrongly on a CPU where a row is no multiple of them
SIZES = {"hidden_size": 64, "intermediate_size": 128}
WIDTH, LAYER = 64, 1
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    tiny_model("llama", **SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder, quantization, dtype="float32"):
    return load_subject_and_tokenizer(folder, dtype=dtype, quantization=quantization, device="cpu").model


def quantised_lens(subject, training="lora"):
    torch.manual_seed(0)
    lens = ConsistencyLensModel.from_subject(
        subject, tiny_tokenizer(), LAYER, num_text_tokens=4, training=training, **INJECTED,
        lora=LORA if training == "lora" else None,
    )  # fmt: skip
    lens.set_statistics(0.1 * torch.randn(WIDTH), 1.3)
    return disturb(lens).eval()


def activations(batch=3):
    return 1.5 * torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(0))


def quantised_layers(model):
    return [module for module in model.modules() if isinstance(module, QUANTISED_LAYERS)]


def weight_of(layer):
    """The weight that a layer multiplies with, in float32."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.float() * scales[:, None] / 127


def dequantised(model):
    """The same model in float32, with the weights that quantisation has left of them."""
    plain = tiny_model("llama", **SIZES)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            plain.get_parameter(name).data.copy_(parameter.data)
    for name, module in model.named_modules():
        if isinstance(module, QUANTISED_LAYERS):
            plain.get_submodule(name).weight.data.copy_(weight_of(module))
    return plain


def kl_gradient(model, ids, positions, replacements):
    """Gradient of the KL with respect to the reconstructions, as the Gumbel objective takes it."""
    subject = Subject(model, LAYER)
    context = subject.context(ids, torch.ones_like(ids), positions)
    assert context.cache is not None  # the one-token pass is right here, too
    replacements = replacements.clone().requires_grad_()
    loss = kl_divergence(context.logits, subject.replaced_logits(context, replacements)).mean()
    return torch.autograd.grad(loss, replacements)[0].flatten()


@pytest.mark.parametrize("error", [0.1, 1.0])
def test_the_gradient_of_the_kl_is_that_of_the_dequantised_model(folder, quantization, error):
    """A good reconstruction is the hard case: rounding weighs more where the two distributions are nearly one."""
    model = load(folder, quantization)
    plain = dequantised(model)
    ids, _ = random_tokens(20, 20, 20)
    positions = torch.tensor([[4, 9], [16, 2], [10, 19]])
    exact = Subject(plain, LAYER).context(ids, torch.ones_like(ids), positions).activations
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    replacements = exact + error * exact.std() * noise
    found, expected = (kl_gradient(m, ids, positions, replacements) for m in (model, plain))
    assert expected.norm() > 1e-4
    assert (found - expected).norm() / expected.norm() < 0.05
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99


def test_one_token_alone_gives_what_it_gives_among_others(folder, quantization):
    model = load(folder, quantization)
    ids, _ = random_tokens(6, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:1, :1]).logits, model(ids).logits[:1, :1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_clones_share_all_that_quantisation_keeps(folder, quantization, when):
    """Before the subject's first pass and after it: bitsandbytes moves the scales of 8-bit weights in a first pass."""
    model = load(folder, quantization)
    if when == "after":
        model(random_tokens(5)[0])
    lens = quantised_lens(model)
    of_subject = quantised_layers(model)
    assert len(of_subject) == 7 * model.config.num_hidden_layers
    for clone in (lens.decoder, lens.encoder):
        assert len(quantised_layers(clone)) == 7 * clone.base.config.num_hidden_layers
        for own, layer in zip(quantised_layers(clone), of_subject, strict=False):
            assert own is not layer and own.weight is layer.weight
            if quantization == "8bit":
                assert own.state is not layer.state
                assert own.state.CB is layer.state.CB is not None and own.state.SCB is layer.state.SCB is not None
            else:
                assert own.weight.quant_state is layer.weight.quant_state is not None
    reference = quantised_layers(freeze_copy(lens.decoder))
    assert len(reference) == len(of_subject)
    for own, layer in zip(reference, of_subject, strict=True):
        kept = (own.state.CB, layer.state.CB) if quantization == "8bit" else (own.quant_state, layer.quant_state)
        assert own.weight is layer.weight and kept[0] is kept[1]


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_a_lens_reads_as_over_the_dequantised_model(folder, quantization, training):
    model = load(folder, quantization)
    lens, plain = quantised_lens(model, training), quantised_lens(dequantised(model), training)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(lens.get_parameter(name).data)
    assert torch.equal(*(one.decode(activations(), keys=keys()).token_ids for one in (lens, plain)))
    outputs = [one(activations(), noise_keys=keys()) for one in (lens, plain)]
    assert torch.equal(outputs[0].text_ids, outputs[1].text_ids)
    torch.testing.assert_close(outputs[0].reconstruction, outputs[1].reconstruction, rtol=1e-3, atol=1e-3)
    # after the passes without gradient that `decode` has run
    found, expected = (
        gradients(output.reconstruction.square().mean() + output.logits.square().mean(), one)
        for output, one in zip(outputs, (lens, plain), strict=True)
    )
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_reach_all_adapters_after_passes_without(folder, quantization, dtype):
    model = load(folder, quantization, dtype)
    lens = quantised_lens(model)
    adapters = {name for name, p in lens.named_parameters() if p.requires_grad and ".lora_" in name}
    assert {name.split(".")[0] for name in adapters} == {"decoder", "encoder"}
    for mode in (False, True, True):
        lens.eval().decode(activations())
        with torch.no_grad():
            model(random_tokens(5)[0])
        lens.train(mode)
        output = lens(activations(), noise_keys=keys())
        found = gradients(output.reconstruction.square().mean() + output.logits.float().square().mean(), lens)
        nothing = [name for name, gradient in found.items() if gradient is None or not gradient.abs().sum() > 0]
        assert nothing == []


def test_adapters_of_the_clones_are_their_own(folder, quantization):
    lens = quantised_lens(load(folder, quantization))
    before = lens.encode(torch.tensor([[5, 9, 4]]))
    with torch.no_grad():
        for name, parameter in lens.decoder.named_parameters():
            if ".lora_" in name:
                parameter.add_(1.0)
    assert torch.equal(lens.encode(torch.tensor([[5, 9, 4]])), before)


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_a_saved_lens_comes_back_quantised_and_reads_the_same(folder, quantization, training, tmp_path):
    lens = quantised_lens(load(folder, quantization), training)
    expected = lens.decode(activations())
    lens.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    loaded = ConsistencyLensModel.from_pretrained(tmp_path)
    given = {f"load_in_{quantization}": True, **({"llm_int8_threshold": 1e-6, "bnb_4bit_quant_type": "nf4"})}
    asked = ConsistencyLensModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**given))
    over_model = ConsistencyLensModel.from_pretrained(tmp_path, base_model=load(folder, quantization))
    for other in (loaded, asked, over_model):
        assert quantised_layers(other.decoder) and quantised_layers(other.subject.model)
        assert other.decode(activations()).texts == expected.texts
        assert torch.equal(other.encode(expected.token_ids), lens.encode(expected.token_ids))
        output = other.train()(activations(), noise_keys=keys())  # a lens that was loaded can be trained on
        found = gradients(output.reconstruction.sum() + output.logits.sum(), other)
        assert all(gradient is not None for gradient in found.values())


def test_weights_that_are_quantised_cannot_be_trained(folder, quantization):
    model = load(folder, quantization)
    with pytest.raises(ValueError, match="training: got 'full', but quantised weights cannot be trained; set it to"):
        clone_subject(model, share_weights=False)
