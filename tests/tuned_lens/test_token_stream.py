from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hub_http import Reply
from tiny_lenses import tiny_tokenizer
from tiny_models import MAX_POSITIONS, tiny_model
from token_texts import BOS, EOS, FRACTION, SEQ_LEN, TEXTS, add_bos, is_held_out, side, words, write_rows

from consistency_lens.data.tokenization import TokenizationArguments, tokenize_corpus
from consistency_lens.hub_connection import HubError
from consistency_lens.tuned_lens import token_stream
from consistency_lens.tuned_lens.token_arguments import TokenArguments
from consistency_lens.tuned_lens.token_blocks import read_token_blocks


def as_parquet_folder(path):
    path.mkdir()
    Dataset.from_dict({"text": TEXTS[:13]}).to_parquet(path / "train-0.parquet")
    Dataset.from_dict({"text": TEXTS[13:]}).to_parquet(path / "train-1.parquet")


def as_jsonl_folder(path):
    write_rows(path / "train.jsonl", TEXTS)


LOCAL = {
    "parquets": as_parquet_folder,
    "jsonls": as_jsonl_folder,
    "data.csv": lambda path: Dataset.from_dict({"text": TEXTS}).to_csv(path),
    "data.parquet": lambda path: Dataset.from_dict({"text": TEXTS}).to_parquet(path),
    "data.txt": lambda path: path.write_text("\n<|endoftext|>\n".join(TEXTS)),
    "saved": lambda path: Dataset.from_dict({"text": TEXTS}).save_to_disk(path),
    "saved_dict": lambda path: DatasetDict(train=Dataset.from_dict({"text": TEXTS})).save_to_disk(path),
}


class TestLocal:
    @pytest.mark.parametrize("name", LOCAL)
    def test_every_kind_of_data_gives_the_same_blocks(self, read, tmp_path, name):
        LOCAL[name](tmp_path / name)
        blocks, expected = read("a", dataset=str(tmp_path / name)), read("b")
        assert np.array_equal(blocks.train, expected.train)
        assert np.array_equal(blocks.validation, expected.validation)
        assert blocks.description["content_hash"] == expected.description["content_hash"]

    def test_a_missing_column_is_an_error_with_the_nearest(self, read, tmp_path):
        dataset = write_rows(tmp_path / "texts.jsonl", TEXTS, column="texts")
        with pytest.raises(ValueError, match="text_column: no column 'text', .* id, texts; did you mean 'texts'"):
            read(dataset=dataset)
        assert read(dataset=dataset, text_column="texts").train.size == 80

    def test_a_row_without_text_is_named(self, read):
        with pytest.raises(ValueError, match="text_column: row 0 of 'id' holds int, not text"):
            read(text_column="id")

    def test_a_missing_split_is_an_error(self, read):
        with pytest.raises(ValueError, match="dataset: cannot read '.*data.jsonl', split 'test'; pass a file"):
            read(dataset_split="test")

    def test_damaged_data_is_an_error_of_one_line(self, read, tmp_path):
        (tmp_path / "data.jsonl").write_text('{"text": "w3 w4"}\n{"text": \n')
        with pytest.raises(ValueError, match="dataset: cannot read '.*data.jsonl' (.*); mend or replace it") as caught:
            read()
        assert "\n" not in str(caught.value)

    def test_a_separator_within_a_line_is_told_of(self, read, caplog, tmp_path):
        write_rows(tmp_path / "data.jsonl", [f"{text} <|endoftext|>" for text in TEXTS])
        read(tokens=64)
        assert "lines of" in caplog.text and "<|endoftext|>" in caplog.text


class TestCorpus:
    @pytest.fixture
    def corpus(self, model, tokenizer, tmp_path):
        model.config.save_pretrained(tmp_path / "subject")
        tokenizer.save_pretrained(tmp_path / "subject")
        args = TokenizationArguments(
            dataset=write_rows(tmp_path / "data.jsonl", TEXTS),
            model=str(tmp_path / "subject"),
            output_dir=str(tmp_path / "corpus"),
            validation_fraction=FRACTION,
        )
        return str(tokenize_corpus(args).path)

    def test_it_is_packed_as_it_was_tokenised(self, read, corpus, tmp_path):
        blocks = read(dataset=corpus)
        expected = {
            held_out: list(chain.from_iterable([BOS, *words(t), EOS] for t in TEXTS if is_held_out(t) == held_out))
            for held_out in (False, True)
        }
        assert blocks.train.reshape(-1).tolist() == expected[False][:80]
        assert blocks.validation.reshape(-1).tolist() == expected[True][:16]
        assert blocks.description["repo_id"] == str(tmp_path / "data.jsonl")
        assert blocks.description["split"] == "train" and blocks.description["corpus"]["fingerprint"]

    def test_a_split_that_is_not_wanted_is_passed_over(self, corpus):
        sequences = token_stream.corpus_sequences(corpus, wanted=lambda split: split == "validation")
        assert {sequence.split for sequence in sequences} == {"validation"}

    def test_another_tokenizer_is_refused(self, read, corpus):
        with pytest.raises(ValueError, match="was made with the tokenizer of .*but that of 'tiny' differs"):
            read(dataset=corpus, tokenizer=tiny_tokenizer(bos=False))

    def test_what_only_texts_have_is_refused(self, read, corpus):
        with pytest.raises(ValueError, match="dataset_split: got 'test', but .* holds no texts"):
            read(dataset=corpus, dataset_split="test")


class TestSamples:
    def test_they_are_the_same_for_a_seed(self, read, tmp_path):
        sampled = {"dataset": "samples", "seq_len": 8, "tokens": 128, "validation_tokens": 16}
        first, again, other = read("a", **sampled), read("b", **sampled), read("c", seed=1, **sampled)
        assert np.array_equal(first.train, again.train) and np.array_equal(first.validation, again.validation)
        assert not np.array_equal(first.train, other.train)
        assert first.description["content_hash"] == again.description["content_hash"]
        assert (
            first.description["repo_id"] == "samples of tiny" and "seed 316" in first.description["sample_description"]
        )
        assert not np.array_equal(read("a", seed=1, **sampled).train, first.train)

    def test_sequences_that_start_with_bos_begin_anywhere_in_longer_documents(self, read):
        blocks = read(
            dataset="samples", seq_len=4, tokens=128, validation_tokens=16, bos_per_sequence=True,
            tokenizer=add_bos(tiny_tokenizer()),
        )  # fmt: skip
        assert (blocks.train[:, 0] == BOS).all()
        assert f"at most {MAX_POSITIONS} tokens a document" in blocks.description["sample_description"]
        assert blocks.description["documents"]["train"] < len(blocks.train)

    def test_every_document_comes_once_and_begins_with_bos(self, model, tokenizer):
        sequences = token_stream.sampled_sequences(model, tokenizer, 6, seed=0, fraction=FRACTION)
        drawn = [next(sequences) for _ in range(150)]
        assert len({sequence.document for sequence in drawn}) == 150
        assert all(sequence.ids[0] == BOS and len(sequence.ids) <= 6 for sequence in drawn)
        assert {sequence.split for sequence in drawn} == {"train", "validation"}

    def test_a_model_with_nothing_new_to_write_ends_them(self, tokenizer):
        model = tiny_model("llama", tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        sequences = token_stream.sampled_sequences(model, tokenizer, 2, seed=0, fraction=FRACTION)
        assert len(list(sequences)) <= 97


REPO = "HuggingFaceFW/fineweb-edu"
CARD = b"""---
configs:
- config_name: default
  data_files: data/*/*.parquet
- config_name: CC-MAIN-2025-26
  data_files: data/CC-MAIN-2025-26/*.parquet
---
"""


class TestHub:
    @pytest.fixture
    def repo(self, hub, tmp_path):
        as_parquet_folder(tmp_path / "parquet")
        names = ("train-0.parquet", "train-1.parquet")
        files = {f"data/CC-MAIN-2025-26/{name}": (tmp_path / "parquet" / name).read_bytes() for name in names}
        files["data/CC-MAIN-2024-10/train-0.parquet"] = files["data/CC-MAIN-2025-26/train-1.parquet"]
        repo = hub.add_repo("dataset", REPO, {"README.md": CARD, **files})
        repo.tags["v1.4.0"] = repo.head.oid
        repo.commit("main", "emptied", {})
        return repo

    @pytest.fixture
    def stream(self, model, tokenizer, tmp_path):
        def stream(**changes):
            args = TokenArguments(
                **{
                    "seq_len": SEQ_LEN,
                    "tokens": 80,
                    "validation_tokens": 16,
                    "validation_fraction": FRACTION,
                    **changes,
                }
            )
            return read_token_blocks(args, model, tokenizer, "tiny", tmp_path / "blocks", progress=False)

        return stream

    def test_the_default_data_set_is_streamed_at_its_revision(self, stream, repo):
        blocks = stream()
        assert blocks.train.reshape(-1).tolist() == side(TEXTS)[:80]
        told = {name: blocks.description[name] for name in ("repo_id", "name", "split", "revision", "commit")}
        assert list(told.values()) == [REPO, "CC-MAIN-2025-26", "train", "v1.4.0", repo.tags["v1.4.0"]]

    def test_no_more_is_fetched_than_is_read(self, stream, repo, hub, monkeypatch):
        monkeypatch.setattr(token_stream, "TEXT_BATCH", 4)
        stream(tokens=12, validation_tokens=4)
        assert hub.count("GET", "2025-26/train-0.parquet") and not hub.count("GET", "2025-26/train-1.parquet")

    def test_blocks_that_are_there_need_no_hub(self, stream, repo, hub):
        stream()
        before = len(hub.requests)
        stream()
        assert len(hub.requests) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": "org/none"}, "there is no file or folder 'org/none' here; repo: no 'org/none' on the Hub"),
            ({"dataset_revision": "v9"}, "revision: 'HuggingFaceFW/fineweb-edu' has no 'v9'"),
            ({"dataset_config": "CC-MAIN-1"}, "dataset: cannot read .*CC-MAIN-1"),
            ({"dataset": "a/b/stories.txt"}, "there is no file or folder 'a/b/stories.txt' here; hub: "),
        ],
    )
    def test_what_is_not_there_is_an_error_of_one_line(self, stream, repo, changes, message):
        with pytest.raises(ValueError, match=message) as caught:
            stream(**changes)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (Reply({"error": "no"}, 403), "hub: the token has no right .*403"),
            (Reply(b"words"), "dataset: cannot read 'HuggingFaceFW.*not a parquet file"),
        ],
    )
    def test_what_fails_on_the_way_is_an_error_of_one_line(self, stream, repo, hub, tmp_path, reply, message):
        hub.faults["GET", "resolve/.*/train-1.parquet"] = reply
        with pytest.raises(ValueError, match=message) as caught:
            stream()
        assert "\n" not in str(caught.value) and not list((tmp_path / "blocks").glob("[!.]*"))

    def test_without_a_network_it_is_an_error_of_one_line(self, stream):
        with pytest.raises(
            HubError, match="dataset: there is no file or folder 'HuggingFaceFW/.*try again later"
        ) as caught:
            stream()
        assert "\n" not in str(caught.value)
