import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, Features, Value

from consistency_lens.data import dataset_reading
from consistency_lens.data.dataset_reading import (
    check_column,
    check_source,
    hub_commit,
    local_hash,
    read_dataset,
    stream_dataset,
)

TEXTS = ["one", "two\nlines", "three"]


def write_jsonl(path):
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))


def write_folder(path):
    path.mkdir()
    write_jsonl(path / "train.jsonl")
    (path / "test.jsonl").write_text('{"text": "four"}\n')


def write_text(path):
    path.write_text("\n<|endoftext|>\n".join(TEXTS))


def saved(split=None):
    return Dataset.from_dict({"text": TEXTS}, split=split)


WRITERS = {
    "data.jsonl": write_jsonl,
    "data.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "data.csv": lambda path: saved().to_csv(path),
    "data.parquet": lambda path: saved().to_parquet(path),
    "data.txt": write_text,
    "data": write_text,
    "folder": write_folder,
    "saved": lambda path: saved().save_to_disk(path),
    "saved_dict": lambda path: DatasetDict(train=saved(), test=saved().select([0])).save_to_disk(path),
}


@pytest.fixture
def read(tmp_path):
    return lambda source, **arguments: read_dataset(str(source), cache_dir=tmp_path / "cache", **arguments)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_data_set_is_read(read, tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name)["text"][:] == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_and_streamed(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert [row["text"] for row in stream_dataset(str(tmp_path / name))] == TEXTS


@pytest.mark.parametrize("name", ["data.txt", "data.csv", "folder", "saved"])
def test_an_unknown_split_cannot_be_streamed(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(ValueError, match=f"dataset: cannot read '.*{name}', split 'tests'; pass a file") as caught:
        stream_dataset(str(tmp_path / name), split="tests")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split", "texts"),
    [("folder", "test", ["four"]), ("saved_dict", "test", ["one"]), ("data.jsonl", "train[1:]", TEXTS[1:])],
)
def test_a_split_is_read_by_its_name(read, tmp_path, name, split, texts):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name, split=split)["text"][:] == texts


def test_a_saved_split_keeps_its_name(read, tmp_path):
    saved("test").save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split="test")["text"][:] == TEXTS
    with pytest.raises(ValueError, match="split 'train', .*it has test"):
        read(tmp_path / "saved")


@pytest.mark.parametrize("name", ["data.txt", "data.csv", "folder", "saved", "saved_dict"])
def test_an_unknown_split_is_an_error_that_names_the_known_ones(read, tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(ValueError, match=f"dataset: cannot read '.*{name}', split 'tests', .*train"):
        read(tmp_path / name, split="tests")


def test_what_changed_is_read_again(read, tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("old")
    read_dataset(str(file), cache_dir=tmp_path / "first")
    file.write_text("new")
    assert read(file)["text"][:] == ["new"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.txt", "\n<|endoftext|>\n"),
        ("data.jsonl", ""),
        ("data.csv", "text\n"),
        ("data.parquet", None),
        ("saved", None),
    ],
)
def test_an_empty_split_is_an_error(read, tmp_path, name, content):
    if content is None:
        empty = Dataset.from_dict({"text": []}, features=Features({"text": Value("string")}))
        empty.to_parquet(tmp_path / name) if name == "data.parquet" else empty.save_to_disk(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"dataset: .*{name}'.* is empty; pass"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"text": "one"\n{', "JSON parse error"),
        ("data.txt", b"caf\xe9", "no UTF-8"),
        ("no/data", b"", ""),
    ],
)
def test_what_cannot_be_read_is_one_line(read, tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"dataset: cannot read '.*{name}'.*{message}") as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("data.jsonl", {"revision": "v1"}),
        ("data.txt", {"config": "en"}),
        ("folder", {"revision": "v1"}),
        ("saved", {"config": "en"}),
    ],
)
def test_what_local_data_does_not_have_is_refused(read, tmp_path, name, arguments):
    WRITERS[name](tmp_path / name)
    (value,) = arguments.values()
    with pytest.raises(ValueError, match=f"dataset: got the .* '{value}', but '.*{name}' is local and has none"):
        read(tmp_path / name, **arguments)


def test_a_folder_of_files_and_a_data_set_of_the_hub_may_have_configurations(tmp_path):
    write_folder(tmp_path / "folder")
    check_source(str(tmp_path / "folder"), "en", None)
    check_source("someone/data", "en", "v1")


def test_an_unknown_column_is_named_with_the_nearest():
    dataset = Dataset.from_dict({"texts": ["one"], "id": [1]})
    check_column(dataset, "texts", "text_column")
    with pytest.raises(ValueError, match="text_column: no column 'text', .* has texts, id; did you mean 'texts'"):
        check_column(dataset, "text", "text_column")
    with pytest.raises(ValueError, match="messages_column: no column 'messages', .*; pass one of them"):
        check_column(dataset, "messages", "messages_column")


def test_the_hash_is_of_names_and_contents(tmp_path):
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b")
    assert local_hash(str(tmp_path / "a")) == local_hash(str(tmp_path / "b"))
    (tmp_path / "b" / "test.jsonl").write_text('{"text": "five"}\n')
    (tmp_path / "a" / "test.jsonl").rename(tmp_path / "a" / "validation.jsonl")
    hashes = [local_hash(str(path)) for path in (tmp_path / "a", tmp_path / "b", tmp_path / "b" / "test.jsonl")]
    assert len(set(hashes)) == 3
    assert local_hash("someone/something") is None


def test_the_hash_of_a_file_knows_how_it_is_read_but_not_where_it_lies(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("data.jsonl", "data.txt", "folder/other.txt"):
        write_jsonl(tmp_path / name)
    hashes = [local_hash(str(tmp_path / name)) for name in ("data.jsonl", "data.txt", "folder/other.txt")]
    assert hashes[0] != hashes[1] == hashes[2]


class TestHub:
    """With what the Hub answers put in place of it."""

    def test_the_commit_is_what_a_revision_stands_for(self, monkeypatch, tmp_path):
        answer = {("someone/data", "v1"): SimpleNamespace(sha="abc")}
        monkeypatch.setattr(
            dataset_reading, "HfApi", lambda: SimpleNamespace(dataset_info=lambda id, revision: answer[id, revision])
        )
        assert hub_commit("someone/data", "v1") == "abc"
        assert hub_commit("someone/data", "v2") is None
        assert hub_commit(str(tmp_path), "v1") is None

    def test_a_data_set_is_loaded_with_its_configuration_and_revision(self, monkeypatch, read):
        calls = []
        monkeypatch.setattr(
            dataset_reading, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or saved()
        )
        assert len(read("someone/data", config="en", split="test", revision="abc")) == 3
        assert calls == [(("someone/data",), {"name": "en", "split": "test", "revision": "abc"})]

    def test_without_a_network_it_is_a_clear_error(self, read):
        assert hub_commit("someone/data", None) is None
        with pytest.raises(ValueError, match="cannot read 'someone/data', split 'train', or it is empty; pass a file"):
            read("someone/data")
