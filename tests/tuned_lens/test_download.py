"""Published tuned lenses fetched from a Hub on loopback: equal to what was published, or nothing under the name."""

import copy
import json
import re
import shutil

import pytest
import torch
from code_blocks import run_card
from hub_http import Reply
from hub_repositories import Blob
from hub_server import HubServer
from published_lenses import add_subject, fit_lens, save_subject
from tiny_models import random_tokens

from consistency_lens.data.cache_check import VerificationError
from consistency_lens.data.subject_loading import load_subject_and_tokenizer
from consistency_lens.hub_connection import HubError
from consistency_lens.tuned_lens.content_checks import content_checks
from consistency_lens.tuned_lens.download import download_tuned_lens, list_tuned_lenses
from consistency_lens.tuned_lens.index import index_text, read_index
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.publish import publish_tuned_lens
from consistency_lens.tuned_lens.verification import verify_tuned_lens

REPO, TAG, NEXT = "user/tuned-lenses", "v2026.01.31", "v2026.02.01"
MODEL, LOCAL = "org/tiny", "local/subject"
FOLDER = f"tuned_lenses/{MODEL}"
NEEDED = dict.fromkeys(["config.json", "model.safetensors", "provenance.json"], "0" * 64)
ENTRY = {
    "sha256": NEEDED, "tl_version": TAG, "model_commit": None, "tokenizer_commit": None, "license": None,
    "licenses": {},
    "acceptance": dict.fromkeys(["gate_A", "gate_B", "gate_C", "gate_D"], True),
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A lens of a model on the Hub, and one of a local model, with the commit that the Hub gives to the first."""
    root = tmp_path_factory.mktemp("fitted")
    commit = add_subject(HubServer(), MODEL, save_subject(root / "there"))
    return fit_lens(root / "of_hub", MODEL, commit), fit_lens(root / "local", seed=1)


@pytest.fixture(scope="module")
def kept():
    """What the Hub holds after the releases, for the tests that come later."""
    return {}


@pytest.fixture
def released(hub, fitted, kept):
    """The repository after two releases, of one model each."""
    of_hub, local = fitted
    if not kept:
        add_subject(hub, MODEL, of_hub.subject)
        publish_tuned_lens(of_hub.path, REPO, tag=TAG)
        publish_tuned_lens(local.path, REPO, tag=NEXT)
        kept.update(repos=copy.deepcopy(hub.repos), large=dict(hub.large))
    hub.repos, hub.large = copy.deepcopy(kept["repos"]), dict(kept["large"])
    hub.requests.clear()
    return hub.dataset(REPO)


def download(path, model=MODEL, **arguments):
    return download_tuned_lens(REPO, path, model=model, progress=False, **arguments)


def change(repo, name, content):
    """Makes a commit that changes one file."""
    repo.commit("main", f"change {name}", {**repo.head.files, name: Blob(content, name.endswith(".safetensors"))})


def names(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_publish_list_download_verify_is_a_round(hub, released, fitted, tmp_path):
    listed = list_tuned_lenses(REPO)
    assert (listed.commit, listed.tags) == (released.head.oid, (TAG, NEXT))
    assert {name: entry.tl_version for name, entry in listed.entries.items()} == {MODEL: TAG, LOCAL: NEXT}
    (found,) = download(tmp_path / "lens", revision=TAG)
    assert found == (MODEL, tmp_path / "lens", TAG, released.tags[TAG], True)
    assert names(found.path) == set(listed.entries[MODEL].sha256)
    subject = load_subject_and_tokenizer(MODEL, hub.model(MODEL).head.oid)
    assert [check for check in verify_tuned_lens(found.path, subject) if not check.passed] == []
    own, fetched = (TunedLens.from_pretrained(path, base_model=subject.model) for path in (fitted[0].path, found.path))
    residuals = own.residuals(random_tokens(9)[0])
    assert torch.equal(own.logits(1, residuals[1]), fetched.logits(1, residuals[1]))


def test_the_whole_tree_comes_with_its_index_and_licences(released, fitted, tmp_path):
    found = download(tmp_path / "all", model=None)
    entries = list_tuned_lenses(REPO).entries
    assert names(tmp_path / "all") == {"INDEX.json", *(file for entry in entries.values() for file in entry.files)}
    assert {lens.model: lens.path for lens in found} == {
        name: tmp_path / "all" / "tuned_lenses" / name for name in (MODEL, LOCAL)
    }
    assert read_index((tmp_path / "all" / "INDEX.json").read_bytes(), REPO) == entries
    for lens in found:
        assert all(check.passed for check in content_checks(lens.path))
    assert not list(tmp_path.glob(".*"))


def test_what_was_fetched_can_be_published_elsewhere_as_it_is(hub, released, tmp_path):
    download(tmp_path / "all", model=None)
    publish_tuned_lens(tmp_path / "all" / "tuned_lenses", "user/mirror", tag=TAG)
    mirror = list_tuned_lenses("user/mirror").entries
    own = list_tuned_lenses(REPO).entries
    assert set(mirror) == set(own)
    for name in own:
        weights = [entries[name].sha256["model.safetensors"] for entries in (own, mirror)]
        assert weights[0] == weights[1]
    provenance = json.loads(hub.dataset("user/mirror").head.files[f"tuned_lenses/{LOCAL}/provenance.json"].content)
    assert provenance["local"] == ["model_id", "dataset.repo_id"]


def test_a_revision_is_that_of_its_time(released, tmp_path):
    with pytest.raises(ValueError, match=f"model: '{REPO}' has {MODEL}, not '{LOCAL}'"):
        download(tmp_path / "lens", model=LOCAL, revision=TAG)
    assert [lens.model for lens in download(tmp_path / "all", model=None, revision=TAG)] == [MODEL]
    assert list(list_tuned_lenses(REPO, released.tags[TAG]).entries) == [MODEL]
    with pytest.raises(ValueError, match=f"revision: '{REPO}' has no 'v2020.01.01'"):
        download(tmp_path / "other", revision="v2020.01.01")


def test_what_main_has_come_to_since_the_last_release_is_not_taken(released, tmp_path):
    change(released, f"{FOLDER}/README.md", b"# mine")
    listed = list_tuned_lenses(REPO)
    assert (listed.commit, listed.later) == (released.tags[NEXT], released.head.oid)
    assert {lens.commit for lens in download(tmp_path / "all", model=None)} == {released.tags[NEXT]}
    assert list_tuned_lenses(REPO, "main").commit == released.head.oid
    released.tags.clear()
    with pytest.raises(ValueError, match=f"the release .* of '{REPO}' is not finished, it has no tag; push it once"):
        download(tmp_path / "lens")


def test_a_second_download_fetches_nothing(hub, released, tmp_path):
    download(tmp_path / "lens")
    hub.requests.clear()
    (found,) = download(tmp_path / "lens")
    assert not found.is_new and hub.count("GET", "safetensors") == 0


def test_a_folder_with_something_else_is_left_alone(released, tmp_path):
    (tmp_path / "mine").mkdir()
    download(tmp_path / "mine")  # empty
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds something else; choose another folder or delete that one"):
        download(tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["model.safetensors", "provenance.json", "README.md"])
def test_a_tampered_file_is_refused_and_nothing_is_left(released, tmp_path, name):
    content = bytearray(released.head.files[f"{FOLDER}/{name}"].content)
    content[len(content) // 2] ^= 1
    change(released, f"{FOLDER}/{name}", bytes(content))
    with pytest.raises(VerificationError, match=f"{FOLDER}/{name} of '{REPO}' has sha256 .* INDEX.json says"):
        download(tmp_path / "lens", revision="main")
    assert not [file for file in tmp_path.rglob("*") if "hub_cache" not in str(file)]
    download(tmp_path / "lens", revision=TAG)  # the release is as it was


def test_a_tampered_licence_is_refused_with_the_tree(released, tmp_path):
    change(released, f"LICENSES/{MODEL}/LICENSE", b"do as you like")
    with pytest.raises(VerificationError, match="LICENSES/org/tiny/LICENSE of"):
        download(tmp_path / "all", model=None, revision="main")
    assert not (tmp_path / "all").exists()


def test_a_download_that_broke_off_leaves_nothing_under_the_name_and_goes_on(hub, released, tmp_path):
    hub.faults["GET", "model.safetensors"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError, match="fails or cannot be reached"):
        download(tmp_path / "lens")
    assert not (tmp_path / "lens").exists()
    hub.faults.clear()
    hub.requests.clear()
    download(tmp_path / "lens")
    assert hub.count("GET", "/config.json") == 0 and hub.count("GET", "model.safetensors") == 1
    assert all(check.passed for check in content_checks(tmp_path / "lens"))
    assert not list(tmp_path.glob(".*"))


def test_a_download_that_was_stopped_leaves_nothing_under_the_name(released, tmp_path, monkeypatch):
    def stop(*_arguments, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("consistency_lens.hub.download.file_hash", stop)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "lens")
    assert not (tmp_path / "lens").exists()


def test_a_private_repository_needs_its_owners_token(hub, fitted, tmp_path, monkeypatch):
    publish_tuned_lens(fitted[1].path, REPO, tag=TAG, private=True)
    download(tmp_path / "mine", model=LOCAL)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match="or it is private; check the name, or log in"):
        download(tmp_path / "theirs", model=LOCAL)
    assert not (tmp_path / "theirs").exists()


def test_repositories_without_an_index_hold_no_lenses(hub, tmp_path):
    hub.add_repo("dataset", "org/text", {"data/train.parquet": b"x"})
    with pytest.raises(ValueError, match="'org/text' holds no tuned lenses"):
        download_tuned_lens("org/text", tmp_path / "lens")
    with pytest.raises(ValueError, match="no 'org/nothing' on the Hub, or it is private"):
        list_tuned_lenses("org/nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "tuned_lenses/../../etc"}, "the path is 'tuned_lenses/../../etc'"),
        ({"sha256": NEEDED | {"../x": "0" * 64}}, "'../x' is no file of a tuned lens"),
        ({"sha256": NEEDED | {"sub/x": "0" * 64}}, "'sub/x' is no file"),
        ({"sha256": NEEDED | {".x": "0" * 64}}, "'.x' is no file"),
        ({"sha256": NEEDED | {"params.pt": "0" * 64}}, "'params.pt' is no file"),
        ({"sha256": NEEDED | {"PARAMS.PT": "0" * 64}}, "'PARAMS.PT' is no file"),
        ({"sha256": NEEDED | {"config.json": "0" * 63}}, "a checksum is no sha256"),
        ({"sha256": {"model.safetensors": "0" * 64}}, "it has no config.json"),
        ({"sha256": []}, "sha256 and licenses must be mappings"),
        ({"licenses": {"LICENSES/org/other/x": "0" * 64}}, "is no licence text of it"),
        ({"tl_version": "latest"}, "the version is 'latest'"),
        ({"acceptance": {"gate_A": True}}, "acceptance must have gate_A"),
        ({"acceptance": dict.fromkeys(["gate_A", "gate_B", "gate_C", "gate_D"], 1)}, "neither true nor false"),
        ({"more": 1}, "it must have the fields path, sha256"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_index(json.dumps({MODEL: ENTRY | {"path": FOLDER} | changes}), REPO)


def test_with_such_an_index_nothing_is_fetched(hub, released, tmp_path):
    index = json.loads(released.head.files["INDEX.json"].content)
    index[MODEL]["sha256"]["../x"] = "0" * 64
    change(released, "INDEX.json", json.dumps(index).encode())
    with pytest.raises(ValueError, match="'../x' is no file of a tuned lens"):
        download(tmp_path / "lens")
    assert not (tmp_path / "lens").exists() and hub.count("GET", FOLDER) == 0


@pytest.mark.parametrize("name", ["../x", "a/../b", "a/b/c", "/x", "a\n"])
def test_an_index_names_models_alone(name):
    with pytest.raises(ValueError, match="the path is"):
        read_index(json.dumps({name: ENTRY | {"path": f"tuned_lenses/{name}"}}), REPO)


def test_an_index_is_read_as_it_was_written():
    entries = read_index(json.dumps({"x": ENTRY | {"path": "tuned_lenses/x"}}), REPO)
    assert read_index(index_text(entries), REPO) == entries


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"org/tiny": 1}'])
def test_an_index_that_is_no_index_is_refused(content):
    with pytest.raises(ValueError, match=f"repo: INDEX.json of '{REPO}'.*pass another revision"):
        read_index(content, REPO)


def test_the_code_in_a_card_runs_as_it_stands(released, fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "of").mkdir(parents=True)
    (tmp_path / "path" / "of" / "subject").symlink_to(fitted[1].subject)
    for folder in (FOLDER, f"tuned_lenses/{LOCAL}"):
        ours, theirs = run_card(released.head.files[f"{folder}/README.md"].content.decode())
        assert torch.equal(theirs["lens"].translators[0].W, ours["lens"].translators[0].W)


def test_the_code_in_the_data_sets_card_runs_as_it_stands(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_card(released.head.files["README.md"].content.decode())
    assert (tmp_path / "lenses" / FOLDER / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "lenses")
