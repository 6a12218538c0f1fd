"""Caches published on a Hub on loopback, by the real client, and read there as anyone would."""

import json
import shutil
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_http import Reply
from published_caches import REPO, build_caches, built, files_of, layer, push, rows_of

from consistency_lens.data import cache_parquet
from consistency_lens.data.activation_cache import ActivationCache, file_hash
from consistency_lens.data.cache_columns import cache_features
from consistency_lens.data.cache_folder import CacheWriteError
from consistency_lens.hub import cache_push
from consistency_lens.hub.cache_pull import pull_cache
from consistency_lens.hub_connection import HubError

__all__ = ["built", "layer"]

SPLITS = ("train", "validation")

# The first words of every text are the same, and contexts end among them or after.
SHARED_BEGINNINGS = [" ".join(["w5"] * 8 + [f"w{9 + (i * 7 + j) % 80}" for j in range(8)]) for i in range(40)]


# What is published


def test_every_shard_is_a_parquet_file_with_its_rows_in_order(hub, layer, tmp_path):
    pushed = push(layer)
    files = files_of(hub)
    for split in ("train", "validation"):
        cache = ActivationCache.open(layer / split)
        shards = cache.provenance["shards"]
        names = [f"data/{split}-{n:05d}-of-{len(shards):05d}.parquet" for n in range(len(shards))]
        assert [name for name in sorted(files) if name.startswith(f"data/{split}-")] == names
        assert pushed.rows[split] == len(cache)
        for name, shard in zip(names, shards, strict=True):
            (tmp_path / "x.parquet").write_bytes(files[name].content)
            table = pq.read_table(tmp_path / "x.parquet")
            assert table.column_names == ["activation", "input_ids", "position", "document", "text"]
            assert len(table) == shard["rows"]
        last = datasets.Dataset.from_file(str(layer / split / shards[-1]["file"])).data.table.combine_chunks()
        assert table.drop_columns(["text"]).combine_chunks().equals(last)
        first_words = [f"w{n}" for n in table["input_ids"][0].as_py()[1:]]
        assert table["text"][0].as_py() == " ".join(["<s>", *first_words])
    assert len(ActivationCache.open(layer / "train").provenance["shards"]) > 1
    assert pushed.url == f"{hub.url}/datasets/{REPO}" and pushed.commit == hub.dataset(REPO).head.oid


def test_the_provenance_goes_along_whole_with_the_parquet_files_in_it_and_no_local_path(hub, layer, built, tmp_path):
    push(layer)
    files = files_of(hub)
    for split in ("train", "validation"):
        published = json.loads(files[f"provenance/{split}.json"].content)
        own = ActivationCache.open(layer / split).provenance
        names = {"subject": "subject", "tokenizer": "subject", "dataset": "texts.txt"}
        names |= {"local": ["subject", "tokenizer", "dataset"]}
        parts = published.pop("parquet")
        assert published.pop("seen_in_training", None) == (None if split == "train" else [])
        assert published == own | names
        for part in parts:
            assert list(part) == ["file", "rows", "bytes", "sha256"]
            blob = files[part["file"]]
            assert (part["bytes"], part["sha256"]) == (len(blob.content), blob.sha256)
        assert sum(part["rows"] for part in parts) == own["rows"]
    root = str(built.subject.parent).encode()
    shown = [name for name, blob in files.items() if root in blob.content or str(tmp_path).encode() in blob.content]
    assert shown == []


def test_validation_rows_that_begin_a_training_context_are_named(hub, layer, tmp_path):
    """Both splits share the first words of some documents, as those that a model writes do."""
    build_caches(tmp_path / "same", texts=SHARED_BEGINNINGS)
    layer = tmp_path / "same" / "layer_1"
    push(layer)
    found = json.loads(files_of(hub)["provenance/validation.json"].content)["seen_in_training"]
    train, validation = (ActivationCache.open(layer / split).dataset["input_ids"][:] for split in SPLITS)
    beginnings = {tuple(context[:end]) for context in train for end in range(1, len(context) + 1)}
    assert found == [row for row, context in enumerate(validation) if tuple(context) in beginnings]
    assert 0 < len(found) < len(validation)
    assert "seen_in_training" not in json.loads(files_of(hub)["provenance/train.json"].content)

    pull_cache(REPO, tmp_path / "pulled", progress=False)
    assert "seen_in_training" not in ActivationCache.open(tmp_path / "pulled" / "validation").provenance
    hub.repos.clear()
    push(tmp_path / "pulled" / "validation")
    assert "seen_in_training" not in json.loads(files_of(hub)["provenance/validation.json"].content)


def test_a_single_cache_is_a_data_set_of_one_split(hub, layer):
    assert push(layer / "validation").rows.keys() == {"validation"}
    assert {name.split("/")[1].split("-")[0] for name in files_of(hub) if name.startswith("data/")} == {"validation"}


def test_without_the_tokenizer_the_contexts_are_tokens_alone(hub, layer, caplog):
    for split in ("train", "validation"):
        file = layer / split / "provenance.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": "nobody/nothing"}))
    push(layer)
    assert "the decoded contexts are left out" in caplog.text
    assert b"`text`" not in files_of(hub)["README.md"].content
    assert datasets.load_dataset(REPO, split="train").column_names == [
        "activation",
        "input_ids",
        "position",
        "document",
    ]


def test_row_groups_are_small(hub, layer, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_parquet, "ROW_GROUP_ROWS", 19)
    push(layer)
    (tmp_path / "x.parquet").write_bytes(files_of(hub)["data/train-00000-of-00003.parquet"].content)
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [19, 19, 1]
    assert all(group.column(0).has_column_index and group.column(0).compression == "ZSTD" for group in groups)


def test_the_parquet_of_a_shard_is_the_same_every_time(built, tmp_path):
    shard = built.layer / "train" / "shard-00000.arrow"
    features = cache_features(32, "float16")
    records = [cache_parquet.write_parquet(shard, tmp_path / f"{n}.parquet", features) for n in range(2)]
    assert records[0]["sha256"] == records[1]["sha256"] == file_hash(tmp_path / "1.parquet")
    whole = rows_of(built.layer / "train")
    assert cache_parquet.read_parquet(tmp_path / "0.parquet", features).equals(whole.slice(0, records[0]["rows"]))


# Read by others


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_datasets_loads_and_streams_it(hub, tmp_path, dtype):
    layer = build_caches(tmp_path, dtype=dtype).layer
    push(layer)
    for split in ("train", "validation"):
        own = ActivationCache.open(layer / split).dataset
        loaded = datasets.load_dataset(REPO, split=split)
        assert loaded.num_rows == own.num_rows
        assert loaded.features["activation"] == own.features["activation"]
        loaded = loaded.remove_columns("text").with_format("arrow")[:]
        assert loaded.combine_chunks().equals(own.data.table.combine_chunks().cast(loaded.schema))
        streamed = list(datasets.load_dataset(REPO, split=split, streaming=True))
        assert [row["document"] for row in streamed] == own["document"][:]
        assert np.array_equal([row["activation"] for row in streamed], own["activation"][:])
    assert hub.count("GET", r"/resolve/.*\.parquet") > 0


# Again, and half-way


def test_a_second_push_uploads_nothing_and_makes_no_commit(hub, layer):
    first = push(layer)
    before = len(hub.dataset(REPO).commits)
    assert before == 2  # the repository's own, and the push
    hub.requests.clear()
    assert push(layer).commit == first.commit
    assert hub.count("PUT", "/large/") == 0 and len(hub.dataset(REPO).commits) == before
    assert [path.name for path in layer.parent.iterdir() if path.name.endswith(".push")] == []


def test_a_push_that_was_stopped_goes_on(hub, layer, monkeypatch):
    written = Counter()
    real = cache_push.write_parquet

    def stopping(shard, *arguments):
        if sum(written.values()) == 2:
            raise KeyboardInterrupt
        written[str(shard)] += 1
        return real(shard, *arguments)

    monkeypatch.setattr(cache_push, "write_parquet", stopping)
    with pytest.raises(KeyboardInterrupt):
        push(layer)
    assert ("dataset", REPO) not in hub.repos or len(hub.dataset(REPO).commits) == 1
    again = Counter()
    monkeypatch.setattr(
        cache_push, "write_parquet", lambda shard, *rest: (again.update([str(shard)]), real(shard, *rest))[1]
    )
    push(layer)
    shards = len(list(layer.rglob("shard-*.arrow")))
    assert len(again) == shards - 2 and not again.keys() & written.keys()


def test_what_was_staged_of_another_cache_is_not_taken(hub, layer, tmp_path):
    folder = push(layer, dry_run=True).folder
    staged = {file.name for file in folder.rglob("*.parquet")}
    shutil.rmtree(layer / "train")
    shutil.copytree(build_caches(tmp_path / "other", seed=1).layer / "train", layer / "train")
    push(layer, text=False)
    (tmp_path / "x.parquet").write_bytes(files_of(hub)["data/train-00000-of-00003.parquet"].content)
    assert "train-00000-of-00003.parquet" in staged
    table = pq.read_table(tmp_path / "x.parquet").combine_chunks()
    assert table.equals(rows_of(layer / "train").slice(0, len(table)))


def test_what_was_staged_of_another_cache_and_cannot_be_removed_is_not_pushed(hub, layer, monkeypatch):
    push(layer, dry_run=True)

    def deny(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "of another user")

    monkeypatch.setattr(shutil, "rmtree", deny)
    with pytest.raises(CacheWriteError, match="cannot write to '.*push': of another user"):
        push(layer, text=False)
    assert ("dataset", REPO) not in hub.repos or len(hub.dataset(REPO).commits) == 1


def test_a_second_push_at_the_same_time_is_refused_and_harms_nothing(hub, layer, monkeypatch):
    upload, refused = cache_push._upload, []

    def upload_while_another_starts(folder, *arguments):
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
        with pytest.raises(ValueError, match="path: another push is at work in '.*push'; wait for it") as caught:
            push(layer, dry_run=True)
        refused.append(str(caught.value))
        assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
        return upload(folder, *arguments)

    monkeypatch.setattr(cache_push, "_upload", upload_while_another_starts)
    assert push(layer).commit == hub.dataset(REPO).head.oid
    assert len(refused) == 1 and "\n" not in refused[0]
    assert not [path for path in layer.parent.glob(".*.push*") if path.is_dir()]


def test_an_upload_that_fails_is_made_up_for_by_the_next(hub, layer):
    hub.faults["POST", "/commit/"] = Reply({"error": "the Hub is down"}, 500)
    with pytest.raises(HubError, match="fails or cannot be reached.*try again"):
        push(layer)
    hub.faults.clear()
    hub.requests.clear()
    push(layer)
    assert hub.count("PUT", "/large/") == 0  # the large files were there already
    assert len([name for name in files_of(hub) if name.endswith(".parquet")]) == 4


def test_a_cache_that_was_built_anew_replaces_all_files(hub, layer, tmp_path):
    push(layer)
    other = build_caches(tmp_path / "other", rows_per_shard=1000).layer
    pushed = push(other)
    names = [name for name in files_of(hub) if name.startswith("data/")]
    assert names and all(name.endswith("-of-00001.parquet") for name in names)
    assert len(hub.dataset(REPO).commits) == 3 and pushed.commit == hub.dataset(REPO).head.oid


def test_a_dry_run_asks_nobody_and_leaves_what_it_would_upload(hub, layer):
    pushed = push(layer, dry_run=True)
    assert hub.requests == []
    names = {str(file.relative_to(pushed.folder)) for file in pushed.folder.rglob("*") if file.is_file()}
    assert {"README.md", "provenance/train.json", "data/validation-00000-of-00001.parquet"} <= names
    assert pushed.commit is None
    push(layer)
    assert names <= files_of(hub).keys()


# Where it goes


def test_a_branch_and_a_private_repository_are_made(hub, layer):
    push(layer, private=True, revision="draft/one")
    repo = hub.dataset(REPO)
    assert repo.private
    assert "README.md" not in repo.head.files
    assert "README.md" in repo.at("draft/one").files
