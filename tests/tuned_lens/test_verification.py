"""The verification of a tuned lens: the right model passes, and each way of being wrong fails its own check."""

import json
import math
import shutil

import pytest
import torch
from published_lenses import fit_lens
from safetensors.torch import load_file, save_file
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data.activation_cache import file_hash
from consistency_lens.data.subject_loading import LoadedSubject
from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens.kpis import DELTA, EARLIER_SHARE, LAST_LAYER
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.verification import decode_at_random, verify_tuned_lens

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return fit_lens(tmp_path_factory.mktemp("fitted"), "org/tiny", COMMIT).path


@pytest.fixture
def lens(fitted, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(fitted, tmp_path / "lens")


def subject(seed=0, revision=COMMIT, tokenizer=None):
    return LoadedSubject(tiny_model("llama", seed=seed), tokenizer or tiny_tokenizer(), revision)


def failed(path, model):
    """Name -> detail of the checks that did not pass; the two that were not tried are left out."""
    return {check.name: check.detail for check in verify_tuned_lens(path, model) if check.checked and not check.passed}


def rewrite(lens, **tensors):
    """Changes weights and the checksum that the provenance has of them."""
    weights = lens / "model.safetensors"
    save_file(load_file(weights) | tensors, weights)
    provenance = json.loads((lens / "provenance.json").read_text())
    (lens / "provenance.json").write_text(json.dumps(provenance | {"sha256": {weights.name: file_hash(weights)}}))


def test_the_lens_of_the_model_passes_all_checks(lens):
    checks = verify_tuned_lens(lens, subject())
    assert [(check.name, check.passed) for check in checks] == [
        (name, True)
        for name in (
            "files", "checksums", "weights", "provenance", "configuration", "gates",
            "revision", "model weights", "tokenizer", "last layer", "delta KL",
        )
    ]  # fmt: skip


def test_random_layers_are_read_at_100_positions_of_the_models_own_text(lens):
    model = subject()
    loaded = TunedLens.from_pretrained(lens, base_model=model.model)
    decoded, again = decode_at_random(loaded, model), decode_at_random(loaded, model)
    assert decoded.layers == [0, 1] and decoded.norm_kl.shape == decoded.tuned_kl.shape == (2, 100)
    assert torch.equal(decoded.tuned_kl, again.tuned_kl)
    assert float(decoded.last_layer_kl.max()) < 1e-6


def test_kl_is_from_the_models_own_distribution_in_bits(lens, monkeypatch):
    model = subject()
    loaded = TunedLens.from_pretrained(lens, base_model=model.model)
    ids = torch.arange(3, 43)
    monkeypatch.setattr("consistency_lens.tuned_lens.verification._documents", lambda _subject: [ids.tolist()])
    decoded = decode_at_random(loaded, model)
    final = model.model(ids[None]).logits[0]
    tuned = loaded.logits(1, loaded.residuals(ids[None])[1, 0])
    expected = kl_divergence(final, tuned) / math.log(2)
    torch.testing.assert_close(decoded.tuned_kl[1].sort().values, expected.sort().values, rtol=1e-4, atol=1e-5)


def test_another_commit_of_the_model_is_refused_and_not_read(lens):
    checks = verify_tuned_lens(lens, subject(revision=OTHER))
    assert failed(lens, subject(revision=OTHER)) == {"revision": f"loaded {OTHER}, fitted on {COMMIT}"}
    assert [(check.name, check.checked) for check in checks[-2:]] == [("last layer", False), ("delta KL", False)]


def test_other_weights_are_refused_even_where_no_commit_is_known(lens):
    found = failed(lens, subject(seed=1, revision=None))
    assert list(found) == ["model weights"] and ", not " in found["model weights"]


def test_another_tokenizer_is_refused(lens):
    assert list(failed(lens, subject(tokenizer=tiny_tokenizer(bos=False)))) == ["tokenizer"]


def test_a_lens_that_is_no_better_than_the_norm_lens_fails(lens):
    zeros = {f"translators.{layer}.W": torch.zeros(32, 32) for layer in (0, 1)}
    rewrite(lens, **zeros, **{f"translators.{layer}.c": torch.zeros(32) for layer in (0, 1)})
    found = failed(lens, subject())
    assert list(found) == ["delta KL"] and "bits at 100 positions of layers 0, 1" in found["delta KL"]


def test_a_last_layer_that_is_not_the_models_head_fails(lens, monkeypatch):
    real = TunedLens.logits
    wrong = lambda self, layer, residual: real(self, layer, residual) * (1.5 if layer == 2 else 1)  # noqa: E731
    monkeypatch.setattr(TunedLens, "logits", wrong)
    assert list(failed(lens, subject())) == ["last layer"]


def test_weights_of_other_names_cannot_be_read(lens):
    rewrite(lens, other=torch.zeros(2))
    assert "unexpected ['other']" in failed(lens, subject())["decoding"]


def test_weights_with_nan_fail(lens):
    rewrite(lens, **{"translators.0.c": torch.full((32,), torch.nan)})
    assert failed(lens, subject()) == {"weights": "translators.0.c: NaN or infinity"}


def test_gates_that_were_not_judged_are_told_and_the_lens_is_read_all_the_same(lens):
    provenance = json.loads((lens / "provenance.json").read_text())
    (lens / "provenance.json").write_text(json.dumps(provenance | {"kpis": None, "acceptance": None}))
    checks = {check.name: check for check in verify_tuned_lens(lens, subject())}
    assert not checks["gates"].passed and checks["delta KL"].passed


def change(lens, **keys):
    """Changes keys of the provenance, those of its `kpis` by their own names."""
    provenance = json.loads((lens / "provenance.json").read_text())
    kpis = provenance["kpis"] | {name: value for name, value in keys.items() if name in provenance["kpis"]}
    others = {name: value for name, value in keys.items() if name not in kpis}
    (lens / "provenance.json").write_text(json.dumps(provenance | {"kpis": kpis} | others))


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        *((DELTA, value) for value in (None, [], [0.3, 0.4], [None, 1, 1], [True, 1, 1], "ABC")),
        *((EARLIER_SHARE, value) for value in ([], [0.9], ["0.9", 0.9])),
        *((LAST_LAYER, value) for value in (None, "0", [0.0])),
    ],
)
def test_gates_are_not_judged_by_figures_of_another_kind(lens, figure, value):
    passed = {f"gate_{letter}": True for letter in "ABCD"}
    change(lens, acceptance=passed, **{figure: value})
    assert failed(lens, None) == {"gates": f"kpis.{figure}: {value!r} is not as gates are judged by"}


@pytest.mark.parametrize(
    ("keys", "check", "detail"),
    [
        ({"acceptance": [True]}, "gates", "kpis and acceptance must be mappings"),
        ({"dataset": "texts"}, "provenance", "dataset is no mapping"),
        ({"translator": "full"}, "configuration", "rank: 'full' in config.json, None in provenance.json"),
    ],
)
def test_parts_of_another_kind_fail(lens, keys, check, detail):
    change(lens, **keys)
    assert failed(lens, None)[check] == detail


@pytest.mark.parametrize("name", ["config.json", "provenance.json"])
def test_a_file_that_is_no_mapping_fails(lens, name):
    (lens / name).write_text("[]")
    assert f"{name} in" in failed(lens, None)["files"]


def test_a_folder_without_provenance_is_no_fitted_lens(lens):
    (lens / "provenance.json").unlink()
    (check,) = verify_tuned_lens(lens, subject())
    assert not check.passed and "no provenance.json" in check.detail
