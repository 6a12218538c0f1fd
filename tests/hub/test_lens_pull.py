"""Published lenses fetched from a Hub on loopback: equal to what was pushed, or nothing under the name."""

import copy
import json
import os
import re

import pytest
import torch
from hub_faults import Fault
from hub_server import Blob, HubServer
from published_small_lenses import change, write_lens
from safetensors.torch import load_file, save_file
from tiny_lenses import tiny_lens, tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModel
from waits import waits

from consistency_lens.data.cache_check import VerificationError
from consistency_lens.fingerprints import tokenizer_hash, weights_hash
from consistency_lens.hub import index, lens_pull
from consistency_lens.hub.lens_checks import find_lenses, verify_lens
from consistency_lens.hub.lens_collection import list_lenses
from consistency_lens.hub.lens_index import index_text, read_lens_index
from consistency_lens.hub.lens_pull import pull_lenses
from consistency_lens.hub.lens_push import push_lenses
from consistency_lens.hub_connection import HubError

__all__ = ["waits"]

LONE, REPO, TAG, NEXT = "user/lens", "user/lenses", "v2026.01.31", "v2026.02.01"
# a base that nobody asks for, as none is on the Hub
BASE = {"base": "somewhere", "revision": None}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What the Hub holds after the releases."""
    return {}


@pytest.fixture
def released(hub, kept, tmp_path_factory) -> HubServer:
    """A lone lens, and a collection of two after two releases."""
    if not kept:
        root = tmp_path_factory.mktemp("lenses")
        push_lenses(write_lens(root / "alone", **BASE), LONE, tag=TAG)
        write_lens(root / "all" / "one", **BASE)
        write_lens(root / "all" / "two", "decoder", **BASE)
        push_lenses(root / "all", REPO, tag=TAG)
        change(root / "all" / "one", "metrics.json", fve=0.9)
        push_lenses(root / "all" / "one", REPO, tag=NEXT)
        kept.update(repos=copy.deepcopy(hub.repos), large=dict(hub.large))
    hub.repos, hub.large = copy.deepcopy(kept["repos"]), dict(kept["large"])
    hub.requests.clear()
    return hub


def pull(path, repo=REPO, **arguments):
    return pull_lenses(repo, path, progress=False, **arguments)


def put(hub, name, content, repo=REPO):
    """Makes a commit that changes one file."""
    head = hub.model(repo).head.files
    blob = Blob(content, name.endswith((".safetensors", ".bin")))
    return hub.model(repo).commit("main", f"change {name}", {**head, name: blob})


def reindex(hub, repo=LONE, **keys):
    """Makes a commit whose index has other keys for its first lens."""
    content = json.loads(hub.model(repo).head.files["INDEX.json"].content)
    next(iter(content["lenses"].values())).update(keys)
    put(hub, "INDEX.json", json.dumps(content).encode(), repo)


def names(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def left(tmp_path):
    return [file for file in tmp_path.iterdir() if file.name not in ("hub_cache", "datasets_cache")]


# What comes


def test_a_lone_lens_is_its_folder_with_its_index(released, tmp_path):
    (found,) = pull(tmp_path / "lens", LONE)
    repo = released.model(LONE)
    assert (found.name, found.path, found.commit, found.is_new) == ("lens", tmp_path / "lens", repo.head.oid, True)
    assert names(found.path) == repo.head.files.keys() - {".gitattributes"}
    for name in names(found.path):
        assert (found.path / name).read_bytes() == repo.head.files[name].content
    assert left(tmp_path) == [tmp_path / "lens"]


def test_one_of_a_collection_is_the_folder_and_all_are_a_folder_each(released, tmp_path):
    (found,) = pull(tmp_path / "mine", lens="two")
    assert (found.path, found.entry.kind) == (tmp_path / "mine", "consistency_lens_decoder")
    assert "config.json" in names(tmp_path / "mine") and "INDEX.json" in names(tmp_path / "mine")
    found = pull(tmp_path / "all")
    assert {lens.name: lens.path for lens in found} == {name: tmp_path / "all" / name for name in ("one", "two")}
    assert find_lenses(tmp_path / "all") == [tmp_path / "all" / "one", tmp_path / "all" / "two"]
    for path in (tmp_path / "mine", tmp_path / "all" / "one", tmp_path / "all" / "two"):
        checks = verify_lens(path)
        assert [check.name for check in checks if not check.passed] == ["model weights"]
        assert {check.name for check in checks} >= {"checksums", "index", "besides", "weights", "code"}
    assert pull(tmp_path / "all", revision=NEXT)[0].is_new is False
    assert pull(tmp_path / "mine", lens="two")[0].is_new is False


def test_a_revision_is_that_of_its_time(released, tmp_path):
    (old,) = pull(tmp_path / "old", lens="one", revision=TAG)
    (new,) = pull(tmp_path / "new", lens="one")
    assert (old.entry.metrics["fve"], new.entry.metrics["fve"]) == (0.5, 0.9)
    assert old.commit == released.model(REPO).tags[TAG]
    with pytest.raises(ValueError, match="holds something else; choose another folder"):
        pull(tmp_path / "old", lens="one")
    with pytest.raises(ValueError, match=f"lens: '{REPO}' has one, two, not 'three'"):
        pull(tmp_path / "x", lens="three")
    with pytest.raises(ValueError, match=f"revision: '{REPO}' has no 'v1999.01.01'"):
        pull(tmp_path / "x", revision="v1999.01.01")


def test_what_a_training_has_pushed_since_the_last_release_is_not_taken(released, tmp_path):
    trained = put(released, "metrics.json", b'{"fve": 0.9}', REPO).oid
    tags = released.model(REPO).tags
    found = list_lenses(REPO)
    assert (found.commit, found.later, found.unfinished) == (tags[NEXT], trained, None)
    assert {lens.commit for lens in pull(tmp_path / "all")} == {tags[NEXT]}
    on_main = list_lenses(REPO, "main")
    assert (on_main.commit, on_main.later) == (trained, None)


def test_a_release_of_an_earlier_day_that_main_is_at_is_taken(released):
    repo = released.model(LONE)
    repo.tags[NEXT] = repo.commits[0].oid
    assert (list_lenses(LONE).commit, list_lenses(LONE).later) == (repo.head.oid, None)


def test_a_repository_with_no_release_at_all_is_told(released):
    released.model(LONE).tags.clear()
    put(released, "metrics.json", b"{}", LONE)
    with pytest.raises(ValueError, match=f"the release {TAG} of '{LONE}' is not finished, it has no tag; push it"):
        list_lenses(LONE)
    put(released, "INDEX.json", index_text({}).encode(), LONE)
    with pytest.raises(ValueError, match=f"'{LONE}' has no release, and its INDEX.json names no lenses; push one"):
        list_lenses(LONE)


def test_a_private_lens_needs_its_owners_token(released, tmp_path, monkeypatch):
    released.model(LONE).private = True
    pull(tmp_path / "mine", LONE)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match="or it is private; check the name, or log in"):
        pull(tmp_path / "theirs", LONE)


def test_repositories_without_an_index_hold_no_lenses(hub, tmp_path):
    hub.add_repo("model", "org/other", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="'org/other' holds no lenses .no INDEX.json.; pass one that does"):
        pull(tmp_path / "x", "org/other")


# Pulls that were stopped


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that are written as they come; of one of 10 MB a small file's beginning would be lost."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8)


def test_a_connection_that_is_cut_is_taken_up_in_the_middle_of_the_file(released, tmp_path, waits, small_chunks):
    size = len(released.model(LONE).head.files["model.safetensors"].content)
    released.plan(Fault.CUT, "GET", "model.safetensors")
    pull(tmp_path / "lens", LONE)
    assert released.ranges == [f"bytes={size // 2}-"] and waits == [1]


def test_the_next_pull_goes_on_in_the_middle_of_the_file(released, tmp_path, waits, small_chunks):
    size = len(released.model(LONE).head.files["model.safetensors"].content)
    released.plan(Fault.CUT, "GET", "model.safetensors")
    released.plan(Fault.ERROR, "GET", "model.safetensors", first=1)
    with pytest.raises(HubError, match="fails or cannot be reached.*try again later"):
        pull(tmp_path / "lens", LONE)
    assert not (tmp_path / "lens").exists()
    assert find_lenses(tmp_path) == []  # what is there has a hidden name
    released.requests.clear()
    released.ranges.clear()
    pull(tmp_path / "lens", LONE)
    assert released.ranges == [f"bytes={size // 2}-"] and released.count("GET", "/config.json") == 0
    assert left(tmp_path) == [tmp_path / "lens"]


def test_a_wait_that_the_hub_asks_for_is_kept_and_an_endless_one_is_not(released, tmp_path, waits):
    released.plan(Fault.BUSY, "GET", "model.safetensors", times=2)
    released.retry_after = 7
    pull(tmp_path / "lens", LONE)
    assert waits == [8, 8]
    released.plan(Fault.BUSY, "GET", "model.safetensors", times=99)
    released.retry_after = 100_000
    with pytest.raises(HubError, match="asks to wait for 100,000 seconds .429.; try again then"):
        pull(tmp_path / "other", LONE)
    assert waits == [8, 8] and not (tmp_path / "other").exists()


def test_a_hub_that_stays_busy_is_given_up(released, tmp_path, waits):
    released.plan(Fault.BUSY, "GET", "model.safetensors", times=99)
    with pytest.raises(HubError, match="fails or cannot be reached"):
        pull(tmp_path / "lens", LONE)
    assert len(waits) == 5


@pytest.mark.parametrize("name", ["/api/models/user/lens$", "model.safetensors"])
def test_silence_is_waited_for_up_to_a_limit(released, tmp_path, waits, monkeypatch, name):
    monkeypatch.setattr("consistency_lens.hub_connection.PATIENCE", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    released.slowness = 0.5
    released.plan(Fault.SLOW, "GET", name, times=99)
    with pytest.raises(HubError, match="fails or cannot be reached .*timed out"):
        pull(tmp_path / "lens", LONE)


# What is refused


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_file_with_another_checksum_is_refused_and_nothing_is_left(released, tmp_path, name):
    content = bytearray(released.model(LONE).head.files[name].content)
    content[len(content) // 2] ^= 1
    put(released, name, bytes(content), LONE)
    with pytest.raises(VerificationError, match=f"{name} of '{LONE}' has sha256 .* INDEX.json says"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []
    pull(tmp_path / "lens", LONE, revision=TAG)  # the release is as it was


def test_a_file_of_another_size_is_not_even_fetched(released, tmp_path):
    put(released, "model.safetensors", b"x" * 1000, LONE)
    released.requests.clear()
    with pytest.raises(VerificationError, match="model.safetensors of .* has 1,000 bytes, not"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert released.count("GET", "resolve/.*/(?!INDEX)") == 0


def test_bytes_that_change_on_the_way_are_refused(released, tmp_path):
    released.plan(Fault.CORRUPT, "GET", "model.safetensors")
    with pytest.raises(VerificationError, match="pull again or pass another revision"):
        pull(tmp_path / "lens", LONE)
    assert left(tmp_path) == []
    pull(tmp_path / "lens", LONE)
    released.plan(Fault.CORRUPT, "GET", "INDEX.json")
    with pytest.raises(VerificationError, match="INDEX.json of .* damaged on its way, try again"):
        list_lenses(LONE)


def test_a_file_that_is_missing_is_told(released, tmp_path):
    head = dict(released.model(LONE).head.files)
    del head["metrics.json"]
    released.model(LONE).commit("main", "drop", head)
    with pytest.raises(ValueError, match=r"lacks a file that it names \(metrics.json\); it is incomplete"):
        pull(tmp_path / "lens", LONE, revision="main")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "old/state.pkl", "STATE.PT", "last.ckpt"])
def test_a_repository_with_a_pickle_is_refused(released, tmp_path, name):
    put(released, name, b"\x80\x04", LONE)
    with pytest.raises(ValueError, match=f"holds '{name}', which is pickled and may run code when it is read"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []


def test_a_pickle_beside_a_lens_is_not_in_the_way_of_another(released, tmp_path):
    put(released, "one/state.pkl", b"\x80\x04")
    pull(tmp_path / "lens", lens="two", revision="main")
    with pytest.raises(ValueError, match="holds 'one/state.pkl'"):
        pull(tmp_path / "all", revision="main")


HOSTILE = [
    "../x", "..", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:x", "C:\\x", ".hidden", "", "x\n", "INDEX.json",
    "x.pt", "x.BIN",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_with_a_file_that_leads_elsewhere_is_refused(released, name):
    content = json.loads(released.model(LONE).head.files["INDEX.json"].content)
    content["lenses"]["lens"]["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is no file of a lens; pass another revision")):
        read_lens_index(json.dumps(content), LONE)


def test_with_such_an_index_nothing_is_fetched(released, tmp_path):
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    reindex(released, files=files | {"../x": {"sha256": "0" * 64, "bytes": 1}})
    released.requests.clear()
    with pytest.raises(ValueError, match="'../x' is no file of a lens"):
        pull(tmp_path / "lens", LONE)
    assert left(tmp_path) == [] and released.count("GET", "resolve/.*/(?!INDEX)") == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "../lens"}, "the path is '../lens'"),
        ({"path": "/lens"}, "the path is '/lens'"),
        ({"kind": "llama"}, "the kind is 'llama'"),
        ({"release": "latest"}, "the release is 'latest'"),
        ({"layer": "3"}, "whole numbers"),
        ({"num_text_tokens": True}, "whole numbers"),
        ({"metrics": {"fve": "0.9"}}, "metrics must be numbers"),
        ({"base_model": {"name": "x"}}, "base_model must have"),
        ({"base_model": {"name": "x", "revision": 3, "weights_hash": None}}, "a text of base_model"),
        ({"files": {"config.json": {"sha256": "0" * 64, "bytes": 1}}}, "it has no model.safetensors"),
        ({"files": ["config.json"]}, "files must be a mapping"),
        ({"more": 1}, "it must have the fields"),
    ],
)
def test_an_entry_that_is_not_as_it_must_be_is_refused(released, keys, message):
    reindex(released, **keys)
    with pytest.raises(ValueError, match=message):
        list_lenses(LONE)


def test_two_names_that_differ_in_capitals_alone_are_refused(released):
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    reindex(released, files=files | {"Config.json": files["config.json"]})
    with pytest.raises(ValueError, match="one name where capitals do not count"):
        list_lenses(LONE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "holds no mapping"),
        (b'{"schema": "consistency-lens/2", "lenses": {}}', "has the schema 'consistency-lens/2', and"),
        (b'{"schema": "consistency-lens/1", "lenses": []}', "pass a repository of lenses, or update"),
        (b'{"schema": "consistency-lens/1", "lenses": {"x": 1}}', "it must have the fields"),
    ],
)
def test_an_index_that_is_none_is_refused(released, content, message):
    put(released, "INDEX.json", content, LONE)
    with pytest.raises(ValueError, match=message) as caught:
        list_lenses(LONE)
    assert "\n" not in str(caught.value)


def test_a_huge_index_is_not_fetched(released, monkeypatch):
    monkeypatch.setattr(index, "LARGEST_INDEX", 1000)
    released.requests.clear()
    with pytest.raises(ValueError, match="and at most 1,000 are read"):
        list_lenses(LONE)
    assert released.count("GET", "resolve") == 0


def test_an_index_is_read_as_it_was_written(released):
    entries = list_lenses(REPO).entries
    assert read_lens_index(index_text(entries), REPO) == entries


def test_links_in_the_place_of_a_pull_are_not_followed(released, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for target in ("elsewhere", "nowhere"):
        os.symlink(tmp_path / target, tmp_path / f"to_{target}")
        with pytest.raises(ValueError, match="is a symbolic link; pass the folder itself, or delete the link"):
            pull(tmp_path / f"to_{target}", LONE)
    partial = tmp_path / f".lens.{released.model(LONE).head.oid[:12]}.partial"
    partial.mkdir()
    os.symlink(tmp_path / "elsewhere" / "x", partial / "config.json")
    with pytest.raises(ValueError, match="config.json' is a symbolic link; delete .* and pull again"):
        pull(tmp_path / "lens", LONE)
    assert names(tmp_path / "elsewhere") == set()


def test_weights_that_are_not_finite_do_not_take_their_place(released, tmp_path):
    weights = tmp_path / "x.safetensors"
    save_file({"projection": torch.full((64,), torch.nan)}, weights)
    content = weights.read_bytes()
    weights.unlink()
    put(released, "model.safetensors", content, LONE)
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    digest = released.model(LONE).head.files["model.safetensors"].sha256
    reindex(released, files=files | {"model.safetensors": {"sha256": digest, "bytes": len(content)}})
    with pytest.raises(VerificationError, match="weights: projection: NaN or infinity"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []


def test_an_index_that_tells_of_another_lens_is_refused(released, tmp_path):
    base = {"name": "org/famous", "revision": "d" * 40, "weights_hash": "b" * 64}
    reindex(released, base_model=base)
    with pytest.raises(VerificationError, match="index: base model: 'somewhere' here, 'org/famous' in INDEX.json"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []


# Code


def test_code_that_comes_along_is_not_run_without_being_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "ran"))
    lens = write_lens(tmp_path / "hostile", **BASE)
    evil = "import os\nopen(os.environ['MARKER'], 'w').close()\n"
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    staged = push_lenses(lens, LONE, tag=TAG, dry_run=True)
    files = {file.name: file.read_bytes() for file in staged.folder.iterdir()}
    config = json.loads(files["config.json"]) | {"auto_map": classes}
    files |= {"config.json": json.dumps(config).encode(), "evil.py": evil.encode()}
    listed = json.loads(files["INDEX.json"])
    repo = hub.add_repo("model", LONE, files)
    listed["lenses"]["lens"]["files"] = {
        name: {"sha256": repo.head.files[name].sha256, "bytes": len(content)}
        for name, content in files.items()
        if name != "INDEX.json"
    }
    put(hub, "INDEX.json", json.dumps(listed).encode(), LONE)
    repo.tags[TAG] = repo.head.oid
    (found,) = pull(tmp_path / "lens", LONE)
    checks = {check.name: check for check in verify_lens(found.path)}
    assert checks["code"].passed and "read them first" in checks["code"].detail
    for place in (str(found.path), LONE):
        assert type(AutoConfig.from_pretrained(place)).__module__.startswith("consistency_lens.")
        with pytest.raises(ValueError):
            AutoModel.from_pretrained(place)  # these weights are nobody's
    assert not (tmp_path / "ran").exists()


def test_code_of_another_repository_is_refused(released, tmp_path):
    config = json.loads(released.model(LONE).head.files["config.json"].content)
    content = json.dumps(config | {"auto_map": {"AutoModel": "evil/repo--code.Model"}}).encode()
    put(released, "config.json", content, LONE)
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    digest = released.model(LONE).head.files["config.json"].sha256
    reindex(released, files=files | {"config.json": {"sha256": digest, "bytes": len(content)}})
    with pytest.raises(VerificationError, match="config.json names code of another repository .evil/repo--code.Model"):
        pull(tmp_path / "lens", LONE, revision="main")


# The base model


@pytest.fixture
def trained(tmp_path):
    """A lens that loads, and the folder of its base model."""
    base = tmp_path / "bases" / "tiny"
    model = tiny_model("llama")
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    lens = tiny_lens()
    for config in (lens.config.decoder, lens.config.encoder):
        config.base_model_name_or_path = str(base)
    hashes = {"weights_hash": weights_hash(model), "tokenizer_hash": tokenizer_hash(tiny_tokenizer())}
    lens.provenance = {"cache": {**hashes, "loaded_as": {"dtype": "float32"}}}
    lens.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained", base


def test_a_lens_is_compared_with_its_base_model(hub, trained, tmp_path):
    lens, base = trained
    assert all(check.passed for check in verify_lens(lens) if check.checked)
    push_lenses(lens, LONE, tag=TAG)
    (found,) = pull(tmp_path / "pulled", LONE)
    checks = verify_lens(found.path, str(base))
    assert all(check.passed for check in checks) and "loads" in {check.name for check in checks}
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    failed = [check.name for check in verify_lens(found.path, str(tmp_path / "other")) if not check.passed]
    assert failed == ["model weights", "loads"]


def test_a_base_model_that_is_here_and_another_is_found_at_the_pull(hub, trained, tmp_path, monkeypatch):
    lens, base = trained
    push_lenses(lens, LONE, tag=TAG)
    monkeypatch.chdir(base.parent)  # where ./tiny is the model
    pull(tmp_path / "right", LONE)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "embed" in name)
    save_file(tensors | {name: tensors[name] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="model weights: hash .*, not "):
        pull(tmp_path / "wrong", LONE)
    assert not (tmp_path / "wrong").exists()
    monkeypatch.setattr(lens_pull, "CHEAP", 0)
    pull(tmp_path / "unasked", LONE)
    assert [check.name for check in verify_lens(tmp_path / "unasked") if not check.passed] == [
        "model weights",
        "loads",
    ]


def test_a_base_model_that_is_pickled_is_not_read_unasked(hub, trained, tmp_path, monkeypatch):
    lens, base = trained
    push_lenses(lens, LONE, tag=TAG)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    monkeypatch.chdir(base.parent)
    (found,) = pull(tmp_path / "pulled", LONE)
    (check,) = [check for check in verify_lens(found.path) if check.name == "model weights"]
    assert not check.checked and "not at hand" in check.detail
