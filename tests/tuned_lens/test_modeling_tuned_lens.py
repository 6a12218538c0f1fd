import pytest
import torch
from at_once import at_once
from tiny_lenses import tiny_tokenizer
from tiny_models import FAMILIES, NUM_LAYERS, VOCAB_SIZE, WIDTH, random_tokens, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens.configuration_tuned_lens import TunedLensConfig, default_rank
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.translator import TunedTranslator

BITS = torch.log(torch.tensor(2.0))
LAST = NUM_LAYERS - 1


def lens_with_noise(family: str = "llama", **settings) -> TunedLens:
    """A lens whose every tensor is away from its default."""
    lens = TunedLens.for_model(tiny_model(family), **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in lens.trained_tensors().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name == "preconditioner.rotation":
                tensor.copy_(torch.linalg.qr(noise).Q)
            elif name.endswith("scale") or name == "norm_temperature":
                tensor.copy_(1 + 0.3 * noise.abs())
            else:
                tensor.add_(0.1 * noise)
    return lens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_last_layer_of_both_lenses_is_the_head(family):
    lens = lens_with_noise(family, rank=4)
    ids, mask = random_tokens(9, 5)
    residuals = lens.residuals(ids, mask)
    assert residuals.shape == (NUM_LAYERS, 2, 9, WIDTH)
    logits = lens.subject_model(input_ids=ids, attention_mask=mask).logits
    for read in (lens.logits, lens.logit_lens):
        kl = kl_divergence(logits, read(LAST, residuals[LAST])) / BITS
        assert kl[mask.bool()].max() < 1e-6
    assert kl_divergence(logits, lens.logits(0, residuals[0]))[mask.bool()].min() > 1e-3


@torch.no_grad()
def test_logits_by_hand():
    lens = lens_with_noise(rank=4, preconditioner="prism")
    model, residual = lens.subject_model, torch.randn(5, WIDTH)
    translator, basis = lens.translators[0], lens.preconditioner
    h = model.model.norm(residual)
    z = ((h - basis.mean) / basis.scale) @ basis.rotation
    z = z + (z @ translator.U) @ translator.V.T + translator.c
    h = (z @ basis.rotation.T) * basis.scale + basis.mean
    expected = model.lm_head(h) / (torch.log1p(translator.log_tau.exp()) + 1e-3)
    torch.testing.assert_close(lens.logits(0, residual), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_translators_before_the_norm_by_hand():
    lens = lens_with_noise("gpt2", learn_temperature=False, translator_place="before_norm")
    model, residual = lens.subject_model, torch.randn(5, WIDTH)
    translator = lens.translators[1]
    expected = model.lm_head(model.transformer.ln_f(residual + residual @ translator.W + translator.c))
    torch.testing.assert_close(lens.logits(1, residual), expected)


@torch.no_grad()
def test_the_calibrated_norm_lens_is_divided_by_its_temperature():
    lens, residual = lens_with_noise(), torch.randn(5, WIDTH)
    torch.testing.assert_close(
        lens.logit_lens(1, residual, calibrated=True), lens.logit_lens(1, residual) / lens.norm_temperature[1]
    )


@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": None}, {"rank": 4, "preconditioner": "prism"}])
def test_a_new_lens_is_nearly_the_norm_lens_and_every_tensor_moves_in_one_step(settings):
    lens, residual = TunedLens.for_model(tiny_model("llama"), **settings), torch.randn(5, WIDTH)
    torch.testing.assert_close(lens.logits(0, residual), lens.logit_lens(0, residual), rtol=0.05, atol=0.05)
    before = {name: p.detach().clone() for name, p in lens.named_parameters()}
    target = torch.randn(5, VOCAB_SIZE)
    optimizer = torch.optim.SGD(lens.parameters(), lr=1e-2)
    sum(kl_divergence(target, lens.logits(k, residual)).sum() for k in range(LAST)).backward()
    optimizer.step()
    for name, parameter in lens.named_parameters():
        assert not torch.equal(before[name], parameter), name
    assert not any(p.requires_grad for p in lens.subject_model.parameters())


@pytest.mark.parametrize(
    "settings", [{"rank": 4, "preconditioner": "prism"}, {"rank": None, "learn_temperature": False}]
)
@torch.no_grad()
def test_saved_and_loaded_it_reads_the_same(tmp_path, settings):
    lens, residual = lens_with_noise(**settings), torch.randn(5, WIDTH)
    lens.provenance = {"seed": 316}
    lens.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "provenance.json"}
    loaded = AutoModel.from_pretrained(tmp_path, base_model=lens.subject_model)
    assert isinstance(loaded, TunedLens) and loaded.provenance == {"seed": 316}
    assert torch.equal(loaded.logits(0, residual), lens.logits(0, residual))
    assert torch.equal(loaded.logit_lens(0, residual, calibrated=True), lens.logit_lens(0, residual, calibrated=True))


@torch.no_grad()
def test_the_subject_is_loaded_when_first_asked_for(tmp_path):
    model, residual = tiny_model("gpt2"), torch.randn(5, WIDTH)
    model.save_pretrained(tmp_path / "subject")
    model.config._name_or_path = str(tmp_path / "subject")
    lens = TunedLens.for_model(model, rank=4)
    lens.save_pretrained(tmp_path / "lens")
    loaded = TunedLens.from_pretrained(tmp_path / "lens")
    assert not loaded._subject
    assert torch.equal(loaded.logits(0, residual), lens.logits(0, residual))


def test_another_subject_is_refused(tmp_path):
    TunedLens.for_model(tiny_model("llama"), rank=4).save_pretrained(tmp_path)
    for other in (tiny_model("llama", num_hidden_layers=2), tiny_model("llama", vocab_size=50), tiny_model("gpt2")):
        with pytest.raises(ValueError, match="the lens was made for"):
            TunedLens.from_pretrained(tmp_path, base_model=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": WIDTH + 1}, f"rank must lie in 1..{WIDTH}"),
        ({"rank": 0}, "rank must lie in"),
        ({"preconditioner": "zca"}, "preconditioner must be one of"),
        ({"translator_place": "inside"}, "translator_place must be one of"),
        ({"preconditioner": "prism", "translator_place": "before_norm"}, "fitted on normalised residuals"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TunedLens.for_model(tiny_model("llama"), **settings)


def test_a_model_of_one_block_is_refused():
    with pytest.raises(ValueError, match="it has one block"):
        TunedLens.for_model(tiny_model("llama", num_hidden_layers=1))


@pytest.mark.parametrize("layer", [-1, NUM_LAYERS])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match="layer must lie in"):
        TunedLens.for_model(tiny_model("llama")).logits(layer, torch.randn(2, WIDTH))


def test_residuals_of_another_width_are_refused():
    with pytest.raises(ValueError, match="the subject's width is 32"):
        TunedLens.for_model(tiny_model("llama")).logit_lens(0, torch.randn(2, WIDTH + 1))


@torch.no_grad()
def test_a_trajectory_is_both_lenses_at_every_token():
    class Letters:
        """As much of a tokenizer as a trajectory asks for."""

        def __call__(self, text):
            return {"input_ids": [ord(letter) % VOCAB_SIZE for letter in text]}

        def batch_decode(self, rows):
            return [f"<{int(row[0])}>" for row in rows]

    lens = lens_with_noise(rank=4)
    lens.tokenizer = Letters()
    found = lens.trajectory("lens")
    residuals = lens.residuals(found.input_ids[None])[:, 0]
    assert found.tuned.shape == (NUM_LAYERS, 4, VOCAB_SIZE) and len(found.tokens) == 4
    torch.testing.assert_close(found.tuned[1], lens.logits(1, residuals[1]).log_softmax(dim=-1))
    torch.testing.assert_close(found.norm[1], lens.logit_lens(1, residuals[1]).log_softmax(dim=-1))
    assert found.top_tokens[0][2] == f"<{int(found.tuned[0, 2].argmax())}>"
    last = lens.logits(LAST, residuals[LAST])
    tuned, norm = (kl_divergence(last, read(0, residuals[0])) for read in (lens.logits, lens.logit_lens))
    torch.testing.assert_close(found.kl_from_final[0], tuned, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.norm_kl_from_final[0], norm, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="no tokens"):
        lens.trajectory("")
    most = lens.subject_model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"text: it has {most + 1} tokens, the model reads {most}; pass a shorter"):
        lens.trajectory("a" * (most + 1))


def test_a_seed_decides_the_first_values():
    one, same, other = (TunedLens.for_model(tiny_model("llama"), rank=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.translators[0].U, same.translators[0].U)
    assert not torch.equal(one.translators[0].U, other.translators[0].U)


def test_temperatures_are_set_and_start_at_one():
    translator = TunedTranslator(WIDTH, 4, temperature=True)
    torch.testing.assert_close(translator.tau, torch.ones(()))
    translator.set_temperature(torch.tensor(2.5))
    torch.testing.assert_close(translator.tau, torch.tensor(2.5))


def test_ranks_follow_the_plan():
    widths = {64: 64, 128: 64, 2048: 64, 3072: 96, 4096: 256, 8192: 256, 32: 32}
    assert {width: default_rank(width) for width in widths} == widths


def test_a_configuration_keeps_its_settings(tmp_path):
    TunedLensConfig(width=8, num_layers=3, rank=2, preconditioner="whitening").save_pretrained(tmp_path)
    loaded = TunedLensConfig.from_pretrained(tmp_path)
    assert (loaded.width, loaded.num_layers, loaded.rank, loaded.preconditioner) == (8, 3, 2, "whitening")


def test_a_lens_without_a_tokenizer_takes_that_of_its_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "subject")
    subject = AutoModelForCausalLM.from_pretrained(tmp_path / "subject")
    TunedLens.for_model(subject, rank=2).save_pretrained(tmp_path / "lens")
    assert not list((tmp_path / "lens").glob("tokenizer*"))
    with pytest.raises(ValueError, match="subject"):
        TunedLens.from_pretrained(tmp_path / "lens").trajectory("once")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    found = TunedLens.from_pretrained(tmp_path / "lens").trajectory("once")
    assert found.input_ids.tolist() == tiny_tokenizer()("once")["input_ids"]
    with pytest.raises(ValueError, match="tokenizer: this lens has none; set lens.tokenizer"):
        TunedLens.for_model(tiny_model("llama")).trajectory("once")


def test_several_threads_get_the_residuals_that_one_gets():
    lens = lens_with_noise(rank=4)
    ids, mask = random_tokens(9, 5)
    expected = lens.residuals(ids, mask)
    works = [lambda: lens.residuals(ids, mask), lambda: lens.block_outputs(ids, [0], mask)[0]]
    whole, first = at_once(*works, times=5)
    assert all(torch.equal(found, expected) for found in whole)
    assert all(torch.equal(found, expected[0]) for found in first)
