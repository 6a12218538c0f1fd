"""Lenses published on a Hub on loopback by the real client: where they lie, what the index says, what is refused."""

import json
import os

import pytest
from hub_faults import Fault
from hub_http import Reply
from hub_server import TOKEN
from published_small_lenses import COMMIT, METRICS, change, write_lens

from consistency_lens.data.cache_check import VerificationError
from consistency_lens.hub.lens_collection import list_lenses
from consistency_lens.hub.lens_index import SCHEMA, read_lens_index
from consistency_lens.hub.lens_push import push_lenses
from consistency_lens.hub_connection import HubError

REPO, TAG, NEXT = "user/lenses", "v2026.01.31", "v2026.02.01"


@pytest.fixture
def lens(tmp_path, base):
    return write_lens(tmp_path / "small")


@pytest.fixture
def base(hub):
    """The model that the lenses read, on the Hub; its commit is set, for the lenses name it."""
    repo = hub.add_repo("model", "org/base", {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT terms"})
    repo.commits[-1].oid = repo.branches["main"] = COMMIT
    return repo


def push(path, tag=TAG, **arguments):
    return push_lenses(path, REPO, tag=tag, **arguments)


def files_of(hub, repo=REPO):
    return {name: blob.content for name, blob in hub.model(repo).head.files.items()}


def test_a_lone_lens_lies_at_the_root_in_one_tagged_commit(hub, lens):
    pushed = push(lens)
    repo = hub.model(REPO)
    assert repo.tags == {TAG: repo.head.oid} and len(repo.commits) == 2
    assert pushed.commit == repo.head.oid and pushed.replaced == {} and pushed.folder is None
    files = files_of(hub)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE", "INDEX.json"} <= set(files)
    assert not [name for name in files if "/" in name] and not (lens.parent / ".small.push").exists()
    assert files["model.safetensors"] == (lens / "model.safetensors").read_bytes()
    assert files["tokenizer.json"] == (lens / "tokenizer.json").read_bytes()
    assert b"mit" in files["README.md"] and REPO.encode() in files["README.md"]
    assert (lens / "README.md").read_text() == "# of the training\n"  # its own stays


def test_the_index_says_what_it_reads_how_well_and_has_every_file(hub, lens):
    push(lens)
    repo, files = hub.model(REPO).head.files, files_of(hub)
    index = json.loads(files["INDEX.json"])
    assert index["schema"] == SCHEMA
    (entry,) = index["lenses"].values()
    assert entry["base_model"] == {"name": "org/base", "revision": COMMIT, "weights_hash": "a" * 64}
    assert (entry["kind"], entry["layer"], entry["num_text_tokens"]) == ("consistency_lens", 3, 4)
    assert (entry["path"], entry["release"], entry["license"]) == ("", TAG, "mit")
    assert entry["metrics"] == {name: value for name, value in METRICS.items() if type(value) in (int, float)}
    assert entry["files"].keys() == files.keys() - {"INDEX.json", ".gitattributes"}
    for name, record in entry["files"].items():
        assert record == {"sha256": repo[name].sha256, "bytes": len(repo[name].content)}
    assert list(read_lens_index(files["INDEX.json"], REPO)) == ["lenses"]


def test_several_lenses_have_a_folder_each_and_are_one_release(hub, base, tmp_path):
    write_lens(tmp_path / "all" / "one")
    write_lens(tmp_path / "all" / "deep" / "two", "decoder")
    write_lens(tmp_path / "all" / "one" / "checkpoint-3")
    assert list(push(tmp_path / "all").lenses) == ["two", "one"]
    files, repo = files_of(hub), hub.model(REPO)
    assert {name.split("/")[0] for name in files} == {".gitattributes", "INDEX.json", "README.md", "one", "two"}
    assert len(repo.commits) == 2
    entries = list_lenses(REPO).entries
    assert {name: entry.kind for name, entry in entries.items()} == {
        "one": "consistency_lens", "two": "consistency_lens_decoder"
    }  # fmt: skip
    card = files["README.md"].decode()
    assert "[one](one/README.md)" in card and "| 0.500 | 0.600 |" in card and 'subfolder="one"' in card
    write_lens(tmp_path / "all" / "other" / "two")
    with pytest.raises(ValueError, match="path: two lenses lie in folders named 'two'; rename one"):
        push(tmp_path / "all", NEXT)


def test_a_lens_is_added_to_a_collection_and_the_others_stay(hub, base, tmp_path):
    for name in ("one", "two"):
        write_lens(tmp_path / "all" / name)
    push(tmp_path / "all")
    before = files_of(hub)
    pushed = push(write_lens(tmp_path / "three"), NEXT)
    assert [*pushed.lenses] == ["three"] and pushed.replaced == {}
    after = files_of(hub)
    kept = [name for name in before if "/" in name]
    assert kept and all(after[name] == before[name] for name in kept) and "three/config.json" in after
    entries = list_lenses(REPO).entries
    assert {name: entry.release for name, entry in entries.items()} == {"one": TAG, "two": TAG, "three": NEXT}
    (tmp_path / "three" / "metrics.json").unlink()
    again = push(tmp_path / "three", "v2026.02.02", name="two")
    assert again.replaced == {"two": TAG}
    assert "two/metrics.json" not in files_of(hub) and "one/metrics.json" in files_of(hub)
    assert list_lenses(REPO).entries["two"].metrics == {} and list_lenses(REPO, TAG).entries["two"].metrics


def test_a_lone_lens_and_a_collection_do_not_mix(hub, lens, tmp_path):
    push(lens)
    write_lens(tmp_path / "all" / "one")
    write_lens(tmp_path / "all" / "two")
    for path, arguments in ((tmp_path / "all", {}), (lens, {"name": "other"})):
        with pytest.raises(ValueError, match="holds a lone lens at its root; push to another"):
            push(path, NEXT, **arguments)
    assert push(lens, NEXT).replaced == {"lenses": TAG}
    with pytest.raises(ValueError, match="name: got 'x' for 2 lenses"):
        push_lenses(tmp_path / "all", "user/other", name="x")
    with pytest.raises(ValueError, match="name: '../x' cannot be that of a folder"):
        push_lenses(lens, "user/other", name="../x")


def test_an_existing_tag_is_refused_with_nothing_uploaded(hub, lens):
    push(lens)
    change(lens, "provenance.json", seed=8)
    hub.requests.clear()
    with pytest.raises(
        ValueError, match=f"tag: '{REPO}' has {TAG} already, and a release never changes; pass another"
    ):
        push(lens)
    assert {method for method, _ in hub.requests} == {"GET"} and len(hub.model(REPO).commits) == 2
    with pytest.raises(ValueError, match="tag: got 'v1'; pass a date as vYYYY.MM.DD"):
        push(lens, "v1")


def test_a_dry_run_leaves_what_it_would_upload_and_makes_nothing(hub, lens):
    pushed = push(lens, dry_run=True)
    assert pushed.commit is None and ("model", REPO) not in hub.repos
    names = {file.name for file in pushed.folder.iterdir()}
    push(lens)
    assert names == files_of(hub).keys() - {".gitattributes"}


def test_a_base_model_in_a_folder_is_named_without_its_place(hub, tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    own = str(tmp_path / "models" / "mine")
    lens = write_lens(tmp_path / "small", base=own, revision=None, recipe={"model": own})
    push(lens)
    shown = [name for name, content in files_of(hub).items() if str(tmp_path).encode() in content]
    assert shown == []
    (entry,) = list_lenses(REPO).entries.values()
    assert (entry.base_model.name, entry.base_model.revision) == ("./mine", None)


def test_private_repositories_and_organisations(hub, lens):
    push(lens, private=True)
    assert hub.model(REPO).private
    with pytest.raises(ValueError, match="no right to do that in 'org/lenses'"):
        push_lenses(lens, "org/lenses", tag=TAG)
    hub.add_repo("model", "user/open", {})
    with pytest.raises(ValueError, match="private: 'user/open' is there and public"):
        push_lenses(lens, "user/open", private=True)


@pytest.mark.parametrize("name", ["training_args.bin", "OPTIMIZER.PT", "state.pkl", "last.ckpt"])
def test_a_pickled_file_is_refused(hub, lens, name):
    (lens / name).write_bytes(b"x")
    hub.requests.clear()
    with pytest.raises(VerificationError, match=f"files: {name}: pickled, which may run code"):
        push(lens)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
def test_a_symbolic_link_is_refused(hub, lens, tmp_path, name):
    (tmp_path / "secret").write_bytes((lens / "model.safetensors").read_bytes())
    (lens / name).unlink(missing_ok=True)
    os.symlink(tmp_path / "secret", lens / name)
    with pytest.raises(VerificationError, match=f"files: {name}: a symbolic link, which may lead anywhere"):
        push(lens)


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("config.json", {"auto_map": {"AutoModel": "other/repo--code.Model"}}, "code of another repository"),
        ("config.json", {"custom_pipelines": {"x": {"impl": "a/b--run.P"}}}, "code of another repository"),
        ("config.json", {"auto_map": {"AutoModel": "code.Model"}}, "code.py: missing"),
        ("config.json", {"decoder": {"layer": -1}}, "configuration: cannot be read"),
        ("config.json", {"decoder": 7}, "configuration: cannot be read"),
    ],
)
def test_a_configuration_that_names_code_from_elsewhere_or_is_none_is_refused(hub, lens, file, keys, message):
    change(lens, file, **keys)
    with pytest.raises(VerificationError, match=message):
        push(lens)


def test_weights_that_are_not_finite_or_no_safetensors_are_refused(hub, lens):
    content = bytearray((lens / "model.safetensors").read_bytes())
    content[-2:] = b"\xff\xff"
    (lens / "model.safetensors").write_bytes(content)
    with pytest.raises(VerificationError, match="weights: projection: NaN or infinity"):
        push(lens)
    (lens / "model.safetensors").write_bytes(b"\x80\x04pickled")
    with pytest.raises(VerificationError, match="weights: model.safetensors: no safetensors"):
        push(lens)


@pytest.mark.parametrize("secret", [TOKEN, "hf_abcdefghijklmnopqrstuvwxyz"])
def test_a_token_in_a_file_is_found_before_anything_is_uploaded(hub, lens, secret):
    change(lens, "provenance.json", recipe={"token": secret})
    with pytest.raises(ValueError, match="a token of the Hub stands in 'provenance.json'") as caught:
        push(lens)
    assert secret not in str(caught.value) and ("model", REPO) not in hub.repos


def test_repositories_of_something_else_are_refused_and_of_a_training_are_not(hub, lens):
    hub.add_repo("model", REPO, {"pytorch_model.gguf": b"x"})
    with pytest.raises(ValueError, match="holds something that is no lens .pytorch_model.gguf."):
        push(lens)
    config = (lens / "config.json").read_bytes()
    hub.add_repo("model", REPO, {"config.json": config, "checkpoint-3/model.safetensors": b"x", "code.py": b"1"})
    push(lens)
    assert "checkpoint-3/model.safetensors" in files_of(hub)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"model_type": "bert"}', "vocab.txt": b"a"}, "a model of type 'bert' that is no lens"),
        ({"config.json": b'{"model_type": ["bert"]}'}, "files, but no lens"),
        ({"config.json": b"[]"}, "files, but no lens"),
        ({"one/config.json": b'{"model_type": "bert"}'}, "files, but no lens"),
        ({"tokenizer.json": b"{}"}, "files, but no lens"),
    ],
)
def test_another_model_is_not_overwritten(hub, lens, files, message):
    files = {"model.safetensors": b"precious", "README.md": b"# mine", **files}
    before = hub.add_repo("model", REPO, files).head
    with pytest.raises(ValueError, match=f"repo: '{REPO}' holds {message}; choose another name"):
        push(lens)
    assert hub.model(REPO).head is before


def test_a_repository_with_a_card_and_a_licence_alone_is_taken(hub, lens):
    hub.add_repo("model", REPO, {"README.md": b"# mine", "LICENSE": b"MIT terms"})
    push(lens)
    assert hub.model(REPO).tags == {TAG: hub.model(REPO).head.oid}


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("metrics.json", {"kl_recovered": float("nan")}, "metrics.json has nan as 'kl_recovered'"),
        ("metrics.json", {"ci95": {"fve": [0.4, float("inf")]}}, "metrics.json has inf as 'ci95.fve.1'"),
        ("config.json", {"initializer_range": float("nan")}, "config.json has nan as 'initializer_range'"),
    ],
)
def test_a_number_that_is_none_is_told_with_its_file_and_key_before_anything_is_uploaded(
    hub, lens, file, keys, message
):
    change(lens, file, **keys)
    with pytest.raises(ValueError, match=f"path: {message}, and JSON no word for it; mend or remove it"):
        push(lens)
    assert ("model", REPO) not in hub.repos


def test_a_record_that_is_broken_is_told_with_its_path_before_anything_is_uploaded(hub, lens):
    (lens / "training_arguments.json").write_text('{"seed": 3,')
    with pytest.raises(ValueError, match=r"path: '.*training_arguments.json' is no JSON \(.*\); mend or remove it$"):
        push(lens)
    assert ("model", REPO) not in hub.repos


def test_paths_without_a_lens_are_a_mistake(hub, tmp_path):
    with pytest.raises(ValueError, match="path: no lens, decoder or encoder at"):
        push(tmp_path)


# Releases that were stopped


def test_a_release_without_its_tag_is_not_shown_and_the_next_push_finishes_it(hub, lens):
    push(lens)
    change(lens, "metrics.json", fve=0.9)
    hub.faults["POST", "/tag/"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError, match="fails or cannot be reached"):
        push(lens, NEXT)
    found = list_lenses(REPO)
    assert found.unfinished == NEXT and [entry.metrics["fve"] for entry in found.entries.values()] == [0.5]
    hub.faults.clear()
    push(lens, NEXT)
    assert list_lenses(REPO).unfinished is None and list_lenses(REPO).entries["lenses"].metrics["fve"] == 0.9


def test_a_first_release_without_its_tag_is_an_error(hub, lens):
    hub.faults["POST", "/tag/"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError):
        push(lens)
    with pytest.raises(
        ValueError, match=f"the release {TAG} of '{REPO}' is not finished, it has no tag; push it once"
    ):
        list_lenses(REPO)


def test_another_release_finishes_the_one_before(hub, base, tmp_path):
    for name in ("one", "two"):
        write_lens(tmp_path / "all" / name)
    hub.faults["POST", "/tag/"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError):
        push(tmp_path / "all")
    hub.faults.clear()
    push(write_lens(tmp_path / "three"), NEXT)
    repo = hub.model(REPO)
    assert repo.tags == {TAG: repo.commits[-2].oid, NEXT: repo.commits[-1].oid}
    assert list_lenses(REPO).tags == (TAG, NEXT) and len(list_lenses(REPO).entries) == 3


def test_a_tag_that_is_made_up_for_stands_at_the_release_and_not_at_a_training_since(hub, lens):
    push(lens)
    repo = hub.model(REPO)
    made = repo.tags.pop(TAG)
    repo.commit("main", "Training in progress, step 3", repo.head.files)
    push(lens, NEXT)
    assert repo.tags == {TAG: made, NEXT: repo.head.oid}


def test_no_tag_is_made_up_for_where_the_commit_of_the_release_is_gone(hub, lens):
    push(lens)
    repo = hub.model(REPO)
    repo.tags.clear()
    repo.head.title = "squashed"
    push(lens, NEXT)
    assert repo.tags == {NEXT: repo.head.oid}


@pytest.mark.parametrize("pattern", ["/commit/", "/tag/"])
def test_an_answer_that_is_lost_is_made_up_for(hub, lens, pattern):
    hub.plan(Fault.LOST, "POST", pattern)
    if pattern == "/tag/":
        push(lens)  # the tag is there, and stands where it should
    else:
        with pytest.raises(HubError):
            push(lens)
        push(lens)
    repo = hub.model(REPO)
    assert repo.tags == {TAG: repo.head.oid} and len(hub.happened) == 1 and len(repo.commits) == 2
