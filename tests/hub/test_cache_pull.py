"""Published caches fetched from a Hub on loopback: equal to what was pushed, or an error and nothing that opens."""

import json
import shutil

import pytest
from hub_http import Reply
from hub_repositories import Blob
from published_caches import REPO, build_caches, built, rows_of

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.cache_check import VerificationError
from consistency_lens.data.cache_description import load_cache_tokenizer
from consistency_lens.data.cache_verification import verify_cache
from consistency_lens.hub import cache_pull
from consistency_lens.hub.cache_pull import pull_cache
from consistency_lens.hub.cache_push import push_cache
from consistency_lens.hub_connection import HubError

__all__ = ["built"]


@pytest.fixture(scope="module")
def published(built):
    """The files that a push uploads, by name."""
    folder = push_cache(built.layer, REPO, dry_run=True, progress=False).folder
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def pushed(hub, published):
    """The Hub's repository, with the caches in it."""
    return hub.add_repo("dataset", REPO, published)


def pull(path, **arguments):
    return pull_cache(REPO, path, progress=False, **arguments)


def change(repo, name, content):
    """Makes a commit that changes one file."""
    head = repo.head.files
    repo.commit("main", f"change {name}", {**head, name: Blob(content, name.endswith(".parquet"))})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_pulled_cache_is_the_one_that_was_pushed(hub, tmp_path, dtype):
    built = build_caches(tmp_path / "built", dtype=dtype)
    commit = push_cache(built.layer, REPO, progress=False).commit
    found = pull(tmp_path / "pulled")
    assert [(cache.split, cache.is_new) for cache in found] == [("train", True), ("validation", True)]
    for cache in found:
        assert cache.path == tmp_path / "pulled" / cache.split
        assert cache.rows == len(rows_of(cache.path))
        assert rows_of(cache.path).equals(rows_of(built.layer / cache.split), check_metadata=True)
        assert all(check.passed for check in verify_cache(cache.path, progress=False))
        own, pulled = (ActivationCache.open(path).provenance for path in (built.layer / cache.split, cache.path))
        assert pulled.pop("pulled_from") == {"repo": REPO, "commit": commit, "split": cache.split}
        differing = {key for key in own | pulled if own.get(key) != pulled.get(key)}
        assert differing <= {"subject", "tokenizer", "dataset", "local", "shards"}
        assert pulled["local"] == ["subject", "tokenizer", "dataset"]
        assert [shard["rows"] for shard in pulled["shards"]] == [shard["rows"] for shard in own["shards"]]
        names = {file.name for file in cache.path.iterdir()}
        assert names == {"provenance.json", *(shard["file"] for shard in pulled["shards"])}


def test_the_hub_is_not_asked_for_what_was_a_folder_elsewhere(hub, built, tmp_path):
    push_cache(built.layer, REPO, progress=False)
    pull(tmp_path / "pulled")
    provenance = ActivationCache.open(tmp_path / "pulled" / "train").provenance
    hub.requests.clear()
    assert load_cache_tokenizer(provenance) is None
    assert load_cache_tokenizer(provenance, str(built.subject)) is not None
    assert hub.requests == []
    # nor by those who have it from whoever pulled it
    push_cache(tmp_path / "pulled", REPO, progress=False)
    pull(tmp_path / "again")
    assert ActivationCache.open(tmp_path / "again" / "train").provenance["local"] == provenance["local"]


def test_a_shard_without_rows_survives(hub, built, tmp_path):
    layer = shutil.copytree(built.layer, tmp_path / "layer_1")
    provenance = json.loads((layer / "validation" / "provenance.json").read_text())
    whole = rows_of(layer / "validation")
    record = cache_pull.write_shard(whole.slice(0, 0), layer / "validation" / "shard-00001.arrow")
    (layer / "validation" / "provenance.json").write_text(
        json.dumps(provenance | {"shards": [*provenance["shards"], record]})
    )
    push_cache(layer, REPO, progress=False)
    pull(tmp_path / "pulled")
    assert rows_of(tmp_path / "pulled" / "validation").equals(whole)


def test_one_split_is_the_folder_itself(pushed, built, tmp_path):
    (found,) = pull(tmp_path / "cache", split="validation")
    assert found.path == tmp_path / "cache"
    assert rows_of(found.path).equals(rows_of(built.layer / "validation"))


def test_a_second_pull_does_nothing(hub, pushed, tmp_path):
    pull(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("shard-*")}
    hub.requests.clear()
    assert [cache.is_new for cache in pull(tmp_path)] == [False, False]
    assert hub.count("GET", r"\.parquet") == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("shard-*")} == before


def test_a_pull_that_was_stopped_goes_on(hub, pushed, built, tmp_path, monkeypatch):
    real, written = cache_pull.write_shard, []

    def stopping(table, target):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target.name)
        return real(table, target)

    monkeypatch.setattr(cache_pull, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        pull(tmp_path / "train", split="train")
    with pytest.raises(ValueError, match="an unfinished cache at"):
        ActivationCache.open(tmp_path / "train")
    monkeypatch.setattr(cache_pull, "write_shard", real)
    hub.requests.clear()
    pull(tmp_path / "train", split="train")
    shards = ActivationCache.open(tmp_path / "train").provenance["shards"]
    assert hub.count("GET", r"data/train.*\.parquet") <= len(shards) - len(written)
    assert rows_of(tmp_path / "train").equals(rows_of(built.layer / "train"))


def test_a_connection_that_breaks_is_exit_code_1_and_the_next_call_goes_on(hub, pushed, built, tmp_path):
    hub.faults["GET", "train-00001"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError, match="fails or cannot be reached"):
        pull(tmp_path / "train", split="train")
    assert (tmp_path / "train" / "shard-00000.arrow").is_file()
    hub.faults.clear()
    pull(tmp_path / "train", split="train")
    assert rows_of(tmp_path / "train").equals(rows_of(built.layer / "train"))


def test_a_file_with_another_checksum_is_refused_and_nothing_opens(pushed, tmp_path):
    name = "data/train-00001-of-00003.parquet"
    content = bytearray(pushed.head.files[name].content)
    content[len(content) // 2] ^= 1
    change(pushed, name, bytes(content))
    with pytest.raises(VerificationError, match="train-00001-of-00003.parquet of .* has sha256"):
        pull(tmp_path / "train", split="train")
    with pytest.raises(ValueError, match="an unfinished cache"):
        ActivationCache.open(tmp_path / "train")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("dtype", "float32", "has columns .* not .*float"), ("width", 31, "has columns")],
)
def test_columns_other_than_the_provenance_says_are_refused(pushed, tmp_path, key, value, message):
    name = "provenance/train.json"
    change(pushed, name, json.dumps(json.loads(pushed.head.files[name].content) | {key: value}).encode())
    with pytest.raises(VerificationError, match=message):
        pull(tmp_path / "train", split="train")
    with pytest.raises(ValueError, match="an unfinished cache"):
        ActivationCache.open(tmp_path / "train")


def test_a_number_of_rows_other_than_the_provenance_says_is_refused(pushed, tmp_path):
    name = "provenance/train.json"
    provenance = json.loads(pushed.head.files[name].content)
    provenance["parquet"][0]["rows"] += 1
    change(pushed, name, json.dumps(provenance).encode())
    with pytest.raises(VerificationError, match="rows, not"):
        pull(tmp_path / "train", split="train")


def test_a_repository_that_lacks_a_file_is_incomplete(pushed, tmp_path):
    name = "data/train-00001-of-00003.parquet"
    pushed.commit("main", "drop", {path: blob for path, blob in pushed.head.files.items() if path != name})
    with pytest.raises(ValueError, match=rf"lacks a file that it names \(.*/{name}\); it is incomplete"):
        pull(tmp_path / "train", split="train")


def test_a_file_name_that_leads_out_of_the_folder_is_refused(pushed, tmp_path):
    name = "provenance/train.json"
    provenance = json.loads(pushed.head.files[name].content)
    provenance["parquet"][0]["file"] = "../../elsewhere.parquet"
    change(pushed, name, json.dumps(provenance).encode())
    with pytest.raises(ValueError, match="names no parquet files of a cache"):
        pull(tmp_path / "train", split="train")
    assert not (tmp_path / "train").exists()


def test_an_older_revision_may_be_asked_for_but_not_into_the_same_folder(pushed, built, tmp_path):
    first = pushed.head.oid
    pull(tmp_path / "new", split="train")
    change(pushed, "notes.md", b"a new commit")
    with pytest.raises(ValueError, match="pulled_from .*choose another folder or delete that one"):
        pull(tmp_path / "new", split="train")
    change(pushed, "data/train-00001-of-00003.parquet", b"another cache by now")
    (found,) = pull(tmp_path / "old", split="train", revision=first)
    assert found.commit == first
    assert rows_of(tmp_path / "old").equals(rows_of(built.layer / "train"))
    assert not pull(tmp_path / "old", split="train", revision=first)[0].is_new


def test_a_folder_with_a_cache_of_ones_own_is_left_alone(pushed, built, tmp_path):
    own = shutil.copytree(built.layer / "train", tmp_path / "train")
    with pytest.raises(ValueError, match="was built with pulled_from None"):
        pull(own, split="train")
    assert rows_of(own).equals(rows_of(built.layer / "train"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "has train, validation, not 'test'"),
        ({"revision": "nowhere"}, "revision: 'user/tiny-activations' has no 'nowhere'"),
    ],
)
def test_what_is_not_there_is_a_mistake(pushed, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        pull(tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_other_repositories_are_no_caches(hub, tmp_path):
    hub.add_repo("dataset", "org/text", {"data/train.parquet": b"x"})
    with pytest.raises(ValueError, match="'org/text' is no activation cache"):
        pull_cache("org/text", tmp_path / "cache")
    with pytest.raises(ValueError, match="no 'org/nothing' on the Hub, or it is private"):
        pull_cache("org/nothing", tmp_path / "cache")


def test_a_private_cache_needs_its_owners_token(hub, built, tmp_path, monkeypatch):
    push_cache(built.layer, REPO, private=True, progress=False)
    pull(tmp_path / "mine", split="train")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match="or it is private; check the name, or log in"):
        pull(tmp_path / "theirs", split="train")
