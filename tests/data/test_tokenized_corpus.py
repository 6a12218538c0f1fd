"""A corpus on disk: how it is opened, what is refused, and where it comes from."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_lenses import tiny_tokenizer
from tokenized_texts import arguments, subject, tokenize

from consistency_lens.data.tokenized_corpus import corpus_origin, open_corpus

__all__ = ["arguments", "subject", "tokenize"]


class TestOpening:
    @pytest.fixture
    def path(self, tokenize):
        return tokenize().path

    def test_is_memory_mapped(self, path):
        assert all(Path(file["filename"]).is_relative_to(path) for file in open_corpus(path, "train").cache_files)
        assert open_corpus(path, "train").cache_files

    def test_refuses_a_folder_that_is_none(self, path):
        with pytest.raises(ValueError, match="corpus: .*nowhere' does not exist; make one with"):
            open_corpus(path.parent / "nowhere", "train")
        with pytest.raises(ValueError, match="is no finished corpus"):
            open_corpus(path.parent, "train")

    def test_refuses_an_unknown_split(self, path):
        with pytest.raises(ValueError, match="no split 'test' in .*; pass train or validation"):
            open_corpus(path, "test")

    def test_refuses_what_is_damaged(self, path):
        (file,) = (path / "train").glob("*.arrow")
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ValueError, match="train' (is damaged|has .* rows instead of)"):
            open_corpus(path, "train")
        (path / "validation" / "state.json").unlink()
        with pytest.raises(ValueError, match="validation' is damaged"):
            open_corpus(path, "validation")

    def test_refuses_a_damaged_record(self, path):
        file = path / "tokenization.json"
        file.write_text(file.read_text()[:-9])
        with pytest.raises(ValueError, match="corpus: .*tokenization.json' is damaged .*; delete the folder"):
            open_corpus(path, "train")

    def test_refuses_another_number_of_rows(self, path):
        Dataset.from_dict({"input_ids": [[1]], "document": [1]}).save_to_disk(path / "other")
        for file in (path / "train").iterdir():
            file.unlink()
        for file in (path / "other").iterdir():
            file.rename(path / "train" / file.name)
        with pytest.raises(ValueError, match="train' has 1 rows instead of"):
            open_corpus(path, "train")


class TestOrigin:
    def test_of_local_data_has_no_revision(self, tokenize, subject):
        corpus = tokenize()
        settings = corpus.record | {"dataset_commit": "abc"}
        (corpus.path / "tokenization.json").write_text(json.dumps(settings))
        origin = corpus_origin(corpus.path, tiny_tokenizer(), subject)
        assert origin.name == corpus.record["settings"]["dataset"] and origin.revision is None

    def test_of_a_data_set_on_the_hub_has_its_commit(self, tokenize, subject):
        corpus = tokenize()
        settings = corpus.record["settings"] | {"dataset_hash": None, "dataset_revision": "v1"}
        for commit, revision in (("abc", "abc"), (None, "v1")):
            record = corpus.record | {"settings": settings, "dataset_commit": commit}
            (corpus.path / "tokenization.json").write_text(json.dumps(record))
            assert corpus_origin(corpus.path, tiny_tokenizer(), subject).revision == revision
