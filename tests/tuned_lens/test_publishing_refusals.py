"""Tuned lenses published on a Hub on loopback by the real client: what is refused."""

import json

import numpy as np
import pytest
import torch
from hub_http import error
from published_lenses import ACCEPTANCE, KPIS, fit_lens
from publishing import COMMIT, FILES, NEXT, REPO, TAG, below, change, files_of, publish
from safetensors.torch import load_file

from consistency_lens.data.activation_cache import file_hash
from consistency_lens.data.cache_check import VerificationError
from consistency_lens.tuned_lens.gates import Judgement, apply_to_provenance, judge
from consistency_lens.tuned_lens.kpis import TEMPERATURES, PromptReading, compute_kpis


@pytest.mark.parametrize("name", ["params.pt", "PARAMS.PT"])
def test_a_pickled_file_is_refused(hub, lens, name):
    (lens / name).write_bytes(b"x")
    with pytest.raises(VerificationError, match=f"files: {name}: pickled"):
        publish(lens)
    assert hub.requests == []


def test_only_safetensors_and_text_are_published_and_they_hold_the_lens(hub, lens):
    (lens / "arguments.json").write_text("{}")
    (lens / "records.csv").write_text("a,b")
    publish(lens)
    assert below(files_of(hub), "tuned_lenses/local/subject") == FILES
    weights = lens.parent / "published.safetensors"
    weights.write_bytes(files_of(hub)["tuned_lenses/local/subject/model.safetensors"])
    own = load_file(lens / "model.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in load_file(weights).items())


def test_weights_that_changed_since_the_fit_are_refused(hub, lens):
    content = bytearray((lens / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (lens / "model.safetensors").write_bytes(content)
    with pytest.raises(VerificationError, match="checksums: model.safetensors: sha256"):
        publish(lens)


def test_weights_that_are_no_safetensors_are_refused(hub, lens):
    (lens / "model.safetensors").write_bytes(b"\x80\x04pickled")
    change(lens, sha256={"model.safetensors": file_hash(lens / "model.safetensors")})
    with pytest.raises(VerificationError, match="weights: model.safetensors: no safetensors"):
        publish(lens)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kpis": None}, "gates: not judged yet: run consistency-lens tuned-lens gates"),
        ({"acceptance": ACCEPTANCE | {"gate_B": True}}, "gates: gate_B is True, and False by the figures"),
        ({"kpis": KPIS | {"last_layer_kl_after_temp_bits": 0.06}}, "gates: gate_C is True, and False"),
        ({"kpis": KPIS | {"median_delta_kl_bits@{25,50,75}%": [0.3, -0.2, 0.3]}}, "gates: gate_A is True, and False"),
        ({"weights_hash": None}, "provenance: lacks weights_hash"),
        ({"dataset": {"repo_id": "a/b", "content_hash": None}}, "provenance: lacks dataset.content_hash"),
        ({"budget": {"tokens": None, "seq_len": 64, "positions_per_seq": 8}}, "provenance: lacks budget.tokens"),
        ({"model_commit": "main", "tokenizer_commit": "main"}, "provenance: 'main' is no commit"),
        ({"model_commit": COMMIT}, "names the commit of one of model and tokenizer alone"),
        ({"model_id": "org/other"}, "configuration: model: '.*' in config.json, 'org/other' in provenance.json"),
        ({"translator": {"rank": 4}}, "configuration: rank: 'full' in config.json, 4 in provenance.json"),
    ],
)
def test_a_provenance_that_does_not_pin_what_it_must_is_refused(hub, lens, keys, message):
    change(lens, **keys)
    with pytest.raises(VerificationError, match=message):
        publish(lens)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("metrics.json", {"kl": [0.1, float("inf")]}, "metrics.json has inf as 'kl.1'"),
        ("config.json", {"initializer_range": float("nan")}, "config.json has nan as 'initializer_range'"),
        ("provenance.json", {"fit": {"kl": float("nan")}}, "provenance.json has nan as 'fit.kl'"),
    ],
)
def test_a_number_that_is_none_is_told_with_its_file_and_key_before_anything_is_uploaded(
    hub, lens, file, keys, message
):
    content = json.loads((lens / file).read_text()) | keys
    (lens / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"path: {message}, and JSON no word for it; mend or remove it"):
        publish(lens)
    assert ("dataset", REPO) not in hub.repos


def test_figures_that_are_broken_are_told_with_their_path(hub, lens):
    (lens / "metrics.json").write_text("{kl: 1}")
    with pytest.raises(ValueError, match=r"path: '.*metrics.json' is no JSON \(.*\); mend or remove it$"):
        publish(lens)
    assert ("dataset", REPO) not in hub.repos


@pytest.mark.parametrize("answers", [True, False])
def test_what_the_gates_write_is_taken_as_it_is(hub, lens, answers):
    bits = np.array([[3.0], [2.0], [0.0]])
    ranks = {"norm_rank": np.array([50, 20, 1]), "tuned_rank": np.array([9, 4, 1])} if answers else {}
    kpis = compute_kpis([PromptReading("p", bits, bits, bits / 2, np.zeros((1, len(TEMPERATURES))), **ranks)])
    gates = judge(kpis)
    apply_to_provenance(lens, Judgement(kpis, gates, {"name": "default"}))
    publish(lens)
    files = files_of(hub)
    assert json.loads(files["INDEX.json"])["local/subject"]["acceptance"] == gates.as_dict()
    card = files["tuned_lenses/local/subject/README.md"].decode()
    assert "On 1 prompts of the suite default" in card and "| median ΔKL at 25 % depth, bits | +1.500 |" in card


def test_another_local_model_of_the_same_name_is_refused(hub, lens, tmp_path):
    publish(lens)
    other = fit_lens(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="'local/subject' in the repository is of another model; rename the folder"):
        publish(other.path, NEXT)


def test_paths_without_a_lens_are_a_mistake(hub, tmp_path):
    with pytest.raises(ValueError, match="path: no tuned lens at .* fit one with: consistency-lens tuned-lens fit"):
        publish(tmp_path / "nothing")


def test_repositories_of_something_else_are_refused(hub, lens):
    hub.add_repo("dataset", REPO, {"data/train.parquet": b"x"})
    with pytest.raises(ValueError, match="holds something that is no tuned lenses"):
        publish(lens)
    hub.add_repo("dataset", REPO, {"README.md": b"# mine"})
    publish(lens)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, lens):
    publish(lens)
    with pytest.raises(ValueError, match="private: .* is there and public"):
        publish(lens, NEXT, private=True)


def test_a_private_repository_is_one(hub, lens):
    publish(lens, private=True)
    assert hub.dataset(REPO).private


def test_without_a_token_nothing_is_made(hub, lens, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match="hub: no token to write .* log in with `hf auth login`"):
        publish(lens)
    assert hub.repos == {}


def test_a_tampered_file_of_another_model_stops_the_release(hub, on_hub, lens):
    publish(on_hub.path)
    repo = hub.dataset(REPO)
    name = "tuned_lenses/org/tiny/provenance.json"
    changed = repo.head.files[name]._replace(content=repo.head.files[name].content.replace(b"316", b"317"))
    repo.commit("main", "tampered", {**repo.head.files, name: changed})
    with pytest.raises(VerificationError, match="provenance.json of .* has sha256"):
        publish(lens, NEXT)
    assert set(repo.tags) == {TAG} and repo.head.title == "tampered"


def test_a_refusal_of_the_hub_is_told(hub, lens):
    hub.faults["POST", "/api/repos/create"] = error(403, "", "no rights")
    with pytest.raises(ValueError, match="the token has no right"):
        publish(lens)
