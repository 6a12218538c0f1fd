"""The folder of a corpus: a second call, what is left beside it, and calls that fail."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from filelock import FileLock
from tokenized_texts import TEXTS, arguments, rows_of, subject, tokenize

from consistency_lens.data import tokenization
from consistency_lens.data.tokenized_corpus import open_rows

__all__ = ["arguments", "subject", "tokenize"]


class TestSecondCall:
    def test_with_the_same_settings_does_nothing(self, tokenize, monkeypatch):
        first = tokenize()
        before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
        monkeypatch.setattr(tokenization, "read_dataset", lambda *args, **kwargs: pytest.fail("reads the data"))
        second = tokenize(num_proc=2)
        assert first.is_new and not second.is_new and second[:2] == first[:2]
        assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_length": 8}, "max_length None, now it is 8"),
            ({"validation_fraction": 0.5}, "validation_fraction 0.3, now it is 0.5"),
            ({"dataset_split": "train[:20]"}, r"dataset_split 'train', now it is 'train\[:20\]'"),
            ({"max_length": 8, "packing": True}, "max_length None, now it is 8"),
        ],
    )
    def test_with_others_names_what_differs(self, tokenize, changes, message):
        tokenize()
        with pytest.raises(ValueError, match=f"output_dir: '.*corpus' was made with {message}"):
            tokenize(**changes)

    def test_with_the_same_data_and_subject_elsewhere_does_nothing(self, tokenize, tmp_path, monkeypatch, subject):
        first = tokenize()
        (tmp_path / "data.jsonl").rename(tmp_path / "same.jsonl")
        shutil.copytree(subject, tmp_path / "copy")
        monkeypatch.chdir(tmp_path)
        assert tokenize(dataset="same.jsonl", model="copy") == (first.path, first.record, False)
        again = tokenize(dataset="./same.jsonl", model="./copy", output_dir="other")
        assert again.record["fingerprint"] == first.record["fingerprint"]
        assert (again.record["settings"]["dataset"], again.record["settings"]["model"]) == ("./same.jsonl", "./copy")

    def test_with_a_subject_of_a_shorter_context_names_it(self, tokenize, tmp_path, subject):
        tokenize()
        shutil.copytree(subject, tmp_path / "short")
        config = json.loads((tmp_path / "short" / "config.json").read_text())
        (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
        with pytest.raises(ValueError, match="was made with context 128, now it is 16"):
            tokenize(model=str(tmp_path / "short"))

    def test_with_changed_data_or_another_tokenizer_names_their_hash(self, tokenize, tmp_path, subject):
        tokenize()
        data = tmp_path / "data.jsonl"
        rows = data.read_text()
        data.write_text(rows + '{"text": "w9", "id": 99}\n')
        with pytest.raises(ValueError, match="was made with dataset_hash"):
            tokenize()
        data.write_text(rows)
        assert not tokenize().is_new
        file = Path(subject) / "tokenizer.json"
        content = file.read_text()
        try:
            file.write_text(content.replace('"w96"', '"w97"'))
            with pytest.raises(ValueError, match="was made with tokenizer_hash"):
                tokenize()
        finally:
            file.write_text(content)


class TestFiles:
    @pytest.mark.parametrize("packing", [False, True])
    def test_neither_processes_nor_the_age_of_the_data_make_a_difference(self, tokenize, tmp_path, packing):
        one = tokenize(max_length=12, packing=packing)
        os.utime(tmp_path / "data.jsonl", (0, 0))
        two = tokenize(max_length=12, packing=packing, num_proc=2, output_dir=str(tmp_path / "two"))
        assert one.record == two.record
        for split in ("train", "validation"):
            assert open_rows(one.path, split)[:] == open_rows(two.path, split)[:]
            states = [(path / split / "state.json").read_text() for path in (one.path, two.path)]
            assert states[0] == states[1]

    def test_nothing_is_left_beside_the_corpus(self, tokenize, tmp_path, monkeypatch):
        for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
            monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
        corpus = tokenize(max_length=12, packing=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data.jsonl"]
        assert sorted(path.name for path in corpus.path.iterdir()) == ["tokenization.json", "train", "validation"]
        assert {path.suffix for path in corpus.path.rglob("*") if path.is_file()} == {".json", ".arrow"}
        for file in corpus.path.rglob("dataset_info.json"):
            assert str(tmp_path) not in file.read_text()

    def test_what_a_killed_run_left_is_in_nobodys_way(self, tokenize, tmp_path):
        left = tmp_path / ".corpus.partial" / "corpus" / "train"
        left.mkdir(parents=True)
        (left / "data-00000-of-00001.arrow").write_bytes(b"half")
        (tmp_path / ".corpus.lock").touch()
        assert len(rows_of(tokenize().path)) == len(TEXTS)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data.jsonl"]

    def test_a_second_call_at_the_same_time_is_refused_and_harms_nothing(self, tokenize, tmp_path, monkeypatch):
        write, seen = tokenization._write_corpus, []

        def write_while_another_starts(*args):
            monkeypatch.setattr(tokenization, "_write_corpus", write)
            with pytest.raises(ValueError, match="output_dir: another tokenize is at work in '.*corpus'"):
                tokenize()
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            return write(*args)

        monkeypatch.setattr(tokenization, "_write_corpus", write_while_another_starts)
        assert len(rows_of(tokenize().path)) == len(TEXTS)
        assert seen == [[".corpus.lock", ".corpus.partial", "data.jsonl"]]

    def test_what_another_call_made_meanwhile_is_taken(self, tokenize, monkeypatch):
        acquire = FileLock.acquire

        def finish_another_first(lock, **arguments):
            monkeypatch.setattr(FileLock, "acquire", acquire)
            assert tokenize().is_new
            return lock.acquire(**arguments)

        monkeypatch.setattr(FileLock, "acquire", finish_another_first)
        assert not tokenize().is_new

    def test_a_failure_leaves_no_folders_that_it_made(self, tokenize, tmp_path):
        (tmp_path / "old").mkdir()
        with pytest.raises(ValueError, match="no column"):
            tokenize(text_column="txt", output_dir=str(tmp_path / "old" / "new" / "deep" / "corpus"))
        assert not list((tmp_path / "old").iterdir())
        assert tokenize(output_dir=str(tmp_path / "old" / "new" / "corpus")).is_new

    def test_a_place_that_cannot_be_written_to_is_no_mistake_in_the_data(self, tokenize, tmp_path):
        for place in (tmp_path / "data.jsonl" / "corpus", Path("/proc/none/corpus")):
            with pytest.raises(OSError, match="corpus: cannot write to '.*corpus'"):
                tokenize(output_dir=str(place))
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]

    def test_a_failure_leaves_nothing(self, tokenize, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tokenization, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            tokenize()
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]

    def test_an_empty_folder_may_be_there(self, tokenize, tmp_path):
        (tmp_path / "corpus").mkdir()
        assert tokenize().is_new

    def test_other_files_are_left_alone(self, tokenize, tmp_path):
        (tmp_path / "corpus" / "train").mkdir(parents=True)
        with pytest.raises(ValueError, match="corpus' holds other files; choose a new folder"):
            tokenize()

    def test_the_corpus_lies_outside_of_the_data(self, tokenize, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data.jsonl").rename(tmp_path / "data" / "train.jsonl")
        with pytest.raises(ValueError, match="lies in the data set"):
            tokenize(dataset=str(tmp_path / "data"), output_dir=str(tmp_path / "data" / "corpus"))
