"""Caches published on a Hub on loopback, by the real client, and read there as anyone would."""

import json
import shutil
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import TOKEN, Reply, error
from published_caches import build_caches, rows_of

from consistency_lens.data import cache_parquet
from consistency_lens.data.activation_cache import ActivationCache, file_hash
from consistency_lens.data.cache_check import VerificationError
from consistency_lens.data.cache_columns import cache_features
from consistency_lens.hub import cache_push
from consistency_lens.hub.cache_pull import pull_cache
from consistency_lens.hub.cache_push import push_cache
from consistency_lens.hub_connection import HubError
from consistency_lens.public_names import public_name

REPO = "user/tiny-activations"
SPLITS = ("train", "validation")
# The first words of every text are the same, and contexts end among them or after.
SHARED_BEGINNINGS = [" ".join(["w5"] * 8 + [f"w{9 + (i * 7 + j) % 80}" for j in range(8)]) for i in range(40)]
SAME_TEXTS = [" ".join(["w5"] * 30 + [f"w{9 + i}"]) for i in range(40)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def layer(built, tmp_path):
    """A copy of the caches that a test may change."""
    return shutil.copytree(built.layer, tmp_path / "layer_1")


def push(path, **arguments):
    return push_cache(path, REPO, progress=False, **arguments)


def files_of(hub):
    return hub.dataset(REPO).head.files


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


def test_splits_with_documents_in_common_are_refused(hub, layer):
    shutil.rmtree(layer / "validation")
    shutil.copytree(layer / "train", layer / "validation")
    file = layer / "validation" / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_split": "validation"}))
    shared = len(set(ActivationCache.open(layer / "train").documents))
    with pytest.raises(ValueError, match=f"'train' and 'validation' share {shared} documents"):
        push(layer)
    assert hub.repos == {}


def test_a_validation_split_of_training_text_alone_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="have contexts of their own, from fewer than two documents"):
        push(build_caches(tmp_path, texts=SAME_TEXTS).layer)
    assert hub.repos == {}


def test_the_card_is_rendered_from_what_was_measured(hub, layer):
    push(layer, license="apache-2.0", language=["en"])
    _, head, text = files_of(hub)["README.md"].content.decode().split("---\n", maxsplit=2)
    metadata = yaml.safe_load(head)
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["en"])
    assert {"consistency-lens", "activations"} <= set(metadata["tags"])
    assert metadata["size_categories"] == ["n<1K"]
    paths = [{"split": split, "path": f"data/{split}-*.parquet"} for split in ("train", "validation")]
    assert metadata["configs"] == [{"config_name": "default", "data_files": paths}]
    train, validation = (ActivationCache.open(layer / split) for split in ("train", "validation"))
    counts = {split["name"]: split["num_examples"] for split in metadata["dataset_info"]["splits"]}
    assert counts == {"train": len(train), "validation": len(validation)}
    sizes = [len(blob.content) for name, blob in files_of(hub).items() if name.endswith(".parquet")]
    assert metadata["dataset_info"]["download_size"] == sum(sizes)
    for told in (train.provenance["weights_hash"], f"| train | {len(train):,} |", "`subject`", "min_position 4"):
        assert told in text
    for split, cache in (("train", train), ("validation", validation)):
        kept = cache.provenance["sequences"]["kept"]
        assert f"| sequences, {split} | {kept} kept, 0 skipped as too short |" in text
        assert f"\n- {split}: 0 rows\n" in text
    assert "this cache's own, made by document" in text and "\n0 rows of `validation` have" in text
    assert "a sequence is" not in text
    assert f"pull --repo {REPO} --split train" in text and "transformers " in text


def test_what_is_on_the_hub_is_linked_at_its_revision(hub, tmp_path):
    names = {"subject_name": "org/model", "subject_revision": "a" * 40}
    origin = {"dataset_name": "org/text", "dataset_revision": "b" * 40}
    facts = {
        "dataset_config": "en", "dataset_split": "test", "text_column": "story", "messages_column": None,
        "max_length": 512, "long_documents": "split", "packing": True,
    }  # fmt: skip
    push(build_caches(tmp_path, **names, **origin, corpus_facts=facts).layer, text=False)
    provenance = json.loads(files_of(hub)["provenance/train.json"].content)
    assert provenance["corpus"] == facts and provenance["local"] == ["tokenizer"]
    text = files_of(hub)["README.md"].content.decode()
    assert f"[org/model](https://huggingface.co/org/model), revision `{'a' * 40}`" in text
    assert f"[org/text](https://huggingface.co/datasets/org/text), revision `{'b' * 40}`" in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["source_datasets"] == ["org/text"] and "org/model" in metadata["tags"]
    assert "| read of the text | config en, split test, column story |" in text
    assert "| a sequence is | at most 512 tokens, longer documents split, packed |" in text
    assert "license" not in metadata and "none is stated" in text
    assert "text" not in [feature["name"] for feature in metadata["dataset_info"]["features"]]


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


@pytest.mark.parametrize(
    ("files", "path", "private", "message"),
    [
        ({"data/train.parquet": b"x"}, ".", False, "holds a data set that is no activation cache"),
        ({"provenance/validation.json": b"{}"}, "train", False, "has the split 'validation' too, which this push"),
        ({"provenance/train.json": b"{}"}, ".", True, "is there and public"),
    ],
)
def test_nothing_of_others_is_overwritten_or_shown(hub, layer, files, path, private, message):
    repo = hub.add_repo("dataset", REPO, files)
    with pytest.raises(ValueError, match=message):
        push(layer / path, private=private)
    assert len(repo.commits) == 1


# Mistakes


def test_a_damaged_cache_is_not_published(hub, layer):
    shard = layer / "train" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match="train at .* does not pass .*shard-00001.arrow"):
        push(layer)
    assert hub.repos == {}


def test_splits_of_different_caches_do_not_go_together(hub, layer, tmp_path):
    other = build_caches(tmp_path / "other", dtype="float32").layer
    shutil.rmtree(layer / "validation")
    shutil.copytree(other / "validation", layer / "validation")
    with pytest.raises(ValueError, match="no splits of one cache: dtype is 'float16' and 'float32'"):
        push(layer)


def test_two_caches_of_one_split_and_unfinished_ones_are_refused(hub, layer, tmp_path):
    shutil.copytree(layer / "train", layer / "train2")
    with pytest.raises(ValueError, match="'train' and 'train2' are both of split 'train'"):
        push(layer)
    (layer / "train2" / "provenance.json").rename(layer / "train2" / "building.json")
    with pytest.raises(ValueError, match="train2' is unfinished"):
        push(layer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no activation cache at"):
        push(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder at"):
        push(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "does not take the token"), ("", "no token to write to 'user/tiny-activations'")],
)
def test_a_wrong_or_missing_token_is_a_mistake_and_not_shown(hub, layer, monkeypatch, tmp_path, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match=message) as caught:
        push(layer)
    assert "\n" not in str(caught.value) and "hf_wrong" not in str(caught.value)
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"license": "Apache 2.0"}, "license: the Hub knows no 'Apache 2.0' .*; did you mean 'apache-2.0'?"),
        ({"license": "mine"}, "pass 'other' if it has none"),
        ({"language": ["en", "English"]}, "language: got 'English'; pass ISO 639 codes"),
        ({"language": ["en-US"]}, "language: got 'en-US'"),
    ],
)
def test_what_the_card_cannot_say_is_a_mistake_before_anything_is_done(hub, layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        push(layer, **arguments)
    assert hub.requests == [] and not layer.with_name(".layer_1.push").exists()


def test_a_card_that_the_hub_does_not_take_is_a_mistake_in_its_words(hub, layer):
    hub.licenses = {"other"}
    with pytest.raises(ValueError, match='hub: .*"license" must be one of') as caught:
        push(layer, license="mit", language=["en", "deu", "code"])
    assert "\n" not in str(caught.value) and len(hub.dataset(REPO).commits) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_what_the_hub_refuses_is_a_mistake_in_its_words(hub, layer, status):
    hub.faults["POST", "/commit/"] = error(status, "", "a file has no name")
    with pytest.raises(ValueError, match=f"does not take this for .*{status}: .*a file has no name"):
        push(layer)


def test_another_ones_name_is_a_mistake(hub, layer):
    with pytest.raises(ValueError, match="no right to do that in 'someone/cache' .403: You don't have the rights"):
        push_cache(layer, "someone/cache", progress=False)
    assert hub.repos == {} and not layer.with_name(".layer_1.push").exists()


def test_an_endpoint_that_is_not_there_fails_at_once(hub, layer):
    hub.__exit__()
    with pytest.raises(HubError, match="fails or cannot be reached") as caught:
        push(layer)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert not layer.with_name(".layer_1.push").exists()


def test_a_refusal_in_the_middle_is_one_line(hub, layer):
    hub.faults["PUT", "/large/"] = error(403, "", "storage is full")
    with pytest.raises(ValueError, match="403: .*storage is full"):
        push(layer)


@pytest.mark.parametrize(
    ("name", "public"),
    [("gpt2", "gpt2"), ("org/model", "org/model"), ("/home/me/model", "model"), ("a/b/c.txt", "c.txt"),
     ("./model", "model"), ("~/model", "model")],
)  # fmt: skip
def test_of_paths_the_last_part_is_public(name, public):
    assert public_name(name) == public


def test_the_parquet_of_a_shard_is_the_same_every_time(built, tmp_path):
    shard = built.layer / "train" / "shard-00000.arrow"
    features = cache_features(32, "float16")
    records = [cache_parquet.write_parquet(shard, tmp_path / f"{n}.parquet", features) for n in range(2)]
    assert records[0]["sha256"] == records[1]["sha256"] == file_hash(tmp_path / "1.parquet")
    whole = rows_of(built.layer / "train")
    assert cache_parquet.read_parquet(tmp_path / "0.parquet", features).equals(whole.slice(0, records[0]["rows"]))
