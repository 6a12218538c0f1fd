import json
import logging
import tracemalloc
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hub_server import Reply
from tiny_lenses import tiny_tokenizer
from tiny_models import MAX_POSITIONS, tiny_model
from tokenizers import processors

from consistency_lens.data.corpus import document_hash, is_validation_document
from consistency_lens.data.tokenization import TokenizationArguments, tokenize_corpus
from consistency_lens.hub_connection import HubError
from consistency_lens.tuned_lens import token_blocks, token_stream
from consistency_lens.tuned_lens.token_arguments import TokenArguments
from consistency_lens.tuned_lens.token_blocks import BLOCKS_FILE, open_token_blocks, read_token_blocks

BOS, EOS, UNKNOWN = 1, 2, 0
FRACTION = 0.3
# each of other words than the one before it; lengths 3..9
TEXTS = [" ".join(f"w{3 + (7 * n + i) % 94}" for i in range(3 + n % 7)) for n in range(40)]
SEQ_LEN = 4


def words(text):
    return [int(word[1:]) for word in text.split()]


def is_held_out(text):
    return is_validation_document(document_hash(text), FRACTION)


def side(texts, held_out=False):
    """The tokens of one side, in order."""
    return list(chain.from_iterable(words(text) for text in texts if is_held_out(text) == held_out))


def write_rows(path, texts, column="text"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps({'id': n, column: text})}\n" for n, text in enumerate(texts)))
    return str(path)


def add_bos(tokenizer):
    """The tokenizer, adding BOS itself from now on."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def long_rows(documents):
    for n in range(documents):
        yield {"text": f"w{3 + n % 94} {TEXTS[6]} " * 30}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def arguments(tmp_path):
    """Makes arguments for `TEXTS`, with changes."""
    dataset = write_rows(tmp_path / "data.jsonl", TEXTS)
    given = {"dataset": dataset, "seq_len": SEQ_LEN, "tokens": 80, "validation_tokens": 16}
    return lambda **changes: TokenArguments(**{**given, "validation_fraction": FRACTION, **changes})


@pytest.fixture
def read(arguments, model, tokenizer, tmp_path):
    def read(folder="blocks", tokenizer=tokenizer, model=model, seed=316, state=None, **changes):
        folder = tmp_path / folder
        return read_token_blocks(arguments(**changes), model, tokenizer, "tiny", folder, seed, state, progress=False)

    return read


class TestArguments:
    def test_the_defaults_are_the_plan(self):
        args = TokenArguments()
        assert (args.dataset, args.dataset_config) == ("HuggingFaceFW/fineweb-edu", "CC-MAIN-2025-26")
        assert (args.dataset_split, args.dataset_revision) == ("train", "v1.4.0")
        assert (args.text_column, args.tokens, args.seq_len) == ("text", 16_000_000, 512)
        assert args.validation_tokens == 65_536

    def test_another_data_set_has_no_configuration_or_revision_unless_they_are_given(self):
        args = TokenArguments(dataset="someone/data")
        assert (args.dataset_config, args.dataset_revision) == (None, None)
        args = TokenArguments(dataset="someone/data", dataset_config="en", dataset_revision="v1")
        assert (args.dataset_config, args.dataset_revision) == ("en", "v1")

    def test_another_configuration_of_the_default_data_set_keeps_the_revision(self):
        args = TokenArguments(dataset_config="CC-MAIN-2024-10")
        assert (args.dataset_config, args.dataset_revision) == ("CC-MAIN-2024-10", "v1.4.0")

    def test_few_tokens_need_few_held_out_ones(self):
        assert TokenArguments(tokens=200_000).validation_tokens == 10_000
        assert TokenArguments(tokens=600).validation_tokens == 512

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": ""}, "dataset: got none; pass it"),
            ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
            ({"tokens": 3}, "tokens: got 3, less than one sequence of 4 tokens; raise it"),
            ({"validation_tokens": 3}, "validation_tokens: got 3, less than one sequence of 4 tokens; raise it"),
            ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, got 0.0"),
            ({"dataset_revision": "v1"}, "got the revision 'v1', but .* is local and has none"),
            ({"dataset": "samples", "dataset_config": "en"}, "dataset_config: got 'en', but 'samples' holds no texts"),
            ({"dataset": "samples", "text_column": "body"}, "text_column: got 'body', but 'samples' holds no texts"),
        ],
    )
    def test_wrong_ones_are_refused(self, arguments, changes, message):
        with pytest.raises(ValueError, match=message):
            arguments(**changes)


class TestPacking:
    def test_documents_lie_end_to_end_from_left_to_right(self, read):
        blocks = read(tokens=80)
        assert blocks.train.dtype == np.int32 and blocks.train.shape == (20, SEQ_LEN)
        assert blocks.train.reshape(-1).tolist() == side(TEXTS)[:80]
        assert blocks.validation.reshape(-1).tolist() == side(TEXTS, held_out=True)[:16]

    def test_by_hand(self, read, tmp_path):
        train, held_out = ["w10 w11 w12", "w11", "w10 w31 w32 w33 w34 w35", "w11 w41"], "w16 w90 w91 w92"
        assert [is_held_out(text) for text in (*train, held_out)] == [False] * 4 + [True]
        dataset = write_rows(tmp_path / "hand.jsonl", [*train[:2], held_out, *train[2:]])
        blocks = read(dataset=dataset, tokens=12, validation_tokens=4)
        assert blocks.train.tolist() == [[10, 11, 12, 11], [10, 31, 32, 33], [34, 35, 11, 41]]
        assert blocks.validation.tolist() == [[16, 90, 91, 92]]

    def test_control_tokens_are_those_that_the_tokenizer_adds(self, read):
        blocks = read(tokenizer=add_bos(tiny_tokenizer()))
        expected = [[BOS, *words(text)] for text in TEXTS if not is_held_out(text)]
        assert blocks.train.reshape(-1).tolist() == list(chain.from_iterable(expected))[:80]

    def test_documents_that_are_not_wanted_are_passed_over(self, arguments, tokenizer):
        rows = Dataset.from_dict({"text": TEXTS})
        sequences = token_stream.text_sequences(rows, arguments(), tokenizer, wanted=lambda split: split == "train")
        assert [sequence.ids.tolist() for sequence in sequences] == [words(t) for t in TEXTS if not is_held_out(t)]

    def test_a_control_token_that_a_text_spells_is_plain_text(self, read, tmp_path):
        dataset = write_rows(tmp_path / "spelt.jsonl", [f"{text} w5</s>" for text in TEXTS])
        tokens = read(dataset=dataset, tokens=40).train
        assert EOS not in tokens and UNKNOWN in tokens

    def test_the_budget_is_rounded_up_to_whole_blocks_and_counted(self, read):
        blocks = read(tokens=78, validation_tokens=13)
        assert blocks.train.size == 80 and blocks.validation.size == 16
        assert blocks.description["tokens"] == {"train": 80, "validation": 16}
        for held_out, (split, tokens) in enumerate(blocks.description["tokens"].items()):
            ends = np.cumsum([len(words(text)) for text in TEXTS if is_held_out(text) == held_out])
            assert blocks.description["documents"][split] == int(np.searchsorted(ends, tokens)) + 1

    def test_reading_stops_when_there_is_enough(self, read, monkeypatch):
        seen = []

        def rows():
            for text in TEXTS * 100:
                seen.append(text)
                yield {"text": text}

        monkeypatch.setattr(token_stream, "stream_dataset", lambda *_: IterableDataset.from_generator(rows))
        monkeypatch.setattr(token_stream, "TEXT_BATCH", 4)
        read(tokens=80)
        assert len(seen) < 40

    def test_no_document_is_on_both_sides(self, read, tmp_path):
        texts = [" ".join([f"w{n}"] * 6) for n in range(3, 97)]
        blocks = read(dataset=write_rows(tmp_path / "one_word.jsonl", texts * 2), tokens=600, validation_tokens=100)
        train, held_out = set(blocks.train.ravel().tolist()), set(blocks.validation.ravel().tolist())
        assert train == {word for n, text in enumerate(texts, 3) for word in [n] if not is_held_out(text)}
        assert held_out and all(is_held_out(texts[word - 3]) for word in held_out)

    def test_what_is_held_out_does_not_hang_on_the_budget(self, read):
        assert np.array_equal(read("a", tokens=64).validation, read("b", tokens=100).validation)

    def test_empty_rows_are_left_out(self, read, tmp_path):
        texts = [text for pair in zip(TEXTS, ["", "  \n", None] * 14, strict=False) for text in pair]
        dataset = write_rows(tmp_path / "gaps.jsonl", texts)
        tokenizer = add_bos(tiny_tokenizer())
        assert np.array_equal(read("a", tokenizer, dataset=dataset).train, read("b", tokenizer).train)

    def test_memory_holds_a_batch_and_not_the_text(self, read, monkeypatch):
        monkeypatch.setattr(token_stream, "TEXT_BATCH", 8)
        peaks = []
        for documents in (100, 800):
            rows = IterableDataset.from_generator(long_rows, gen_kwargs={"documents": documents})
            monkeypatch.setattr(token_stream, "stream_dataset", lambda *_, rows=rows: rows)
            tracemalloc.start()
            read(f"blocks{len(peaks)}", tokens=documents * 100)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.2 * peaks[0]


class TestDescription:
    def test_it_is_what_provenance_says_of_the_data(self, read, tmp_path):
        description = read().description
        assert description.pop("content_hash") == read("again").description["content_hash"]
        assert description == {
            "repo_id": str(tmp_path / "data.jsonl"),
            "name": None,
            "split": "train",
            "revision": None,
            "commit": None,
            "sample_description": "streamed; tokenized with model tokenizer; packed to 4",
            "seq_len": SEQ_LEN,
            "documents": description["documents"],
            "tokens": {"train": 80, "validation": 16},
        }

    def test_the_content_hash_is_of_the_documents_that_are_used_in_order(self, read, tmp_path):
        def content_hash(name, texts):
            return read(name, dataset=write_rows(tmp_path / f"{name}.jsonl", texts)).description["content_hash"]

        first, second = (n for n, text in enumerate(TEXTS[:10]) if not is_held_out(text)), None
        first, second = next(first), next(first)
        changed, swapped = list(TEXTS), list(TEXTS)
        changed[first] = next(f"{TEXTS[first]} w{n}" for n in range(3, 97) if not is_held_out(f"{TEXTS[first]} w{n}"))
        swapped[first], swapped[second] = TEXTS[second], TEXTS[first]
        held_out = next(n for n, text in enumerate(TEXTS) if is_held_out(text))
        without = TEXTS[:held_out] + TEXTS[held_out + 1 :]
        original = content_hash("original", TEXTS)
        assert len({original, content_hash("changed", changed), content_hash("swapped", swapped)}) == 3
        assert content_hash("without", without) != original
        assert content_hash("more", [*TEXTS, "w3 w4"]) == original

    def test_two_runs_write_the_same_bytes(self, read, tmp_path):
        read("a"), read("b")
        for name in ("train.npy", "validation.npy", BLOCKS_FILE):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class TestLength:
    def test_the_default_becomes_the_context(self, read, tmp_path):
        dataset = write_rows(tmp_path / "long.jsonl", [f"{text} " * 50 for text in TEXTS])
        blocks = read(dataset=dataset, seq_len=512, tokens=4096, validation_tokens=512)
        assert blocks.train.shape == (32, MAX_POSITIONS) and blocks.description["seq_len"] == MAX_POSITIONS
        assert blocks.description["sample_description"].endswith(f"packed to {MAX_POSITIONS}")

    def test_another_length_must_fit_the_context(self, read):
        with pytest.raises(ValueError, match="seq_len: got 129, beyond the model's context of 128; lower it"):
            read(seq_len=129, tokens=1000, validation_tokens=200)

    def test_a_model_without_a_longest_context_takes_any(self, read, tmp_path):
        dataset = write_rows(tmp_path / "long.jsonl", [f"{text} " * 50 for text in TEXTS])
        blocks = read(model=tiny_model("bloom"), dataset=dataset, seq_len=512, tokens=2048, validation_tokens=512)
        assert blocks.train.shape == (4, 512)


class TestFiles:
    @pytest.fixture
    def inode(self, tmp_path):
        return lambda: (tmp_path / "blocks" / "train.npy").stat().st_ino

    def test_the_same_settings_reuse_them(self, read, inode):
        first, before = read(), inode()
        again = read()
        assert inode() == before and np.array_equal(first.train, again.train)
        assert again.description == first.description
        assert isinstance(again.train, np.memmap) and not again.train.flags.writeable

    @pytest.mark.parametrize("changes", [{"tokens": 84}, {"seq_len": 5}, {"validation_fraction": 0.4}])
    def test_others_make_them_anew(self, read, inode, changes):
        read()
        before = inode()
        blocks = read(**changes)
        assert inode() != before
        assert np.array_equal(blocks.train, read("fresh", **changes).train)

    def test_so_does_changed_data(self, read, tmp_path):
        before = read()
        write_rows(tmp_path / "data.jsonl", TEXTS[1:])
        assert not np.array_equal(read().train, before.train)

    def test_and_another_tokenizer(self, read):
        tokenizer = tiny_tokenizer()
        before = read(tokenizer=tokenizer)
        assert not np.array_equal(read(tokenizer=add_bos(tokenizer)).train, before.train)

    def test_a_killed_writing_leaves_nothing_half(self, read, monkeypatch, tmp_path):
        read()
        with monkeypatch.context() as patch:
            patch.setattr(token_blocks.BlockWriter, "finish", lambda _self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                read("new")
            assert not list((tmp_path / "new").glob("[!.]*"))
            with pytest.raises(ZeroDivisionError):
                read(tokens=84)
        with pytest.raises(ValueError, match="blocks: none in"):
            open_token_blocks(tmp_path / "blocks")
        assert read("new").train.size == 80 and read(tokens=84).train.size == 84

    def test_nor_does_one_killed_between_the_files(self, read, monkeypatch, tmp_path):
        read()
        with monkeypatch.context() as patch:
            patch.setattr(token_blocks, "write_json", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                read(tokens=84)
        with pytest.raises(ValueError, match="blocks: none in"):
            open_token_blocks(tmp_path / "blocks")
        assert read(tokens=80).train.size == 80

    @pytest.mark.parametrize("size", [0, 60, 200])
    def test_damaged_files_are_made_anew(self, read, caplog, tmp_path, size):
        before = read().train.copy()
        with open(tmp_path / "blocks" / "train.npy", "r+b") as file:
            file.truncate(size)
        with pytest.raises(ValueError, match="blocks: cannot read train.npy in .*delete it"):
            open_token_blocks(tmp_path / "blocks")
        assert np.array_equal(read().train, before) and "they are made anew" in caplog.text

    def test_other_files_than_recorded_are_refused(self, read, tmp_path):
        read()
        np.save(tmp_path / "blocks" / "validation.npy", np.zeros((3, SEQ_LEN), np.int32))
        with pytest.raises(ValueError, match=r"validation.npy in .* is \(3, 4\) instead of \(4, 4\)"):
            open_token_blocks(tmp_path / "blocks")

    def test_the_first_process_writes_and_the_others_wait_for_it(self, read, tmp_path):
        waited = []

        def first_process():
            waited.append((tmp_path / "blocks" / BLOCKS_FILE).exists())
            read(state=SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None))

        other = SimpleNamespace(is_main_process=False, wait_for_everyone=first_process)
        assert read(state=other).train.size == 80 and waited == [False]


class TestTooLittle:
    def test_fewer_tokens_than_asked_for_are_taken_with_a_warning(self, read, caplog):
        blocks = read(tokens=1000, validation_tokens=200)
        train, held_out = side(TEXTS), side(TEXTS, held_out=True)
        assert blocks.train.reshape(-1).tolist() == train[: len(train) // 4 * 4]
        assert blocks.validation.reshape(-1).tolist() == held_out[: len(held_out) // 4 * 4]
        assert f"{blocks.train.size} tokens instead of 1000 (train)" in caplog.text
        assert f"{blocks.validation.size} tokens instead of 200 (validation)" in caplog.text

    def test_enough_is_no_warning(self, read, caplog):
        with caplog.at_level(logging.WARNING):
            read()
        assert caplog.text == ""

    def test_less_than_sixteen_blocks_are_refused(self, read, tmp_path):
        train = [text for text in TEXTS if not is_held_out(text)]
        held_out = next(text for text in TEXTS if is_held_out(text) and len(words(text)) >= SEQ_LEN)
        few = [held_out, *train[: int(np.searchsorted(np.cumsum([len(words(text)) for text in train]), 64))]]
        dataset = write_rows(tmp_path / "few.jsonl", few)
        with pytest.raises(ValueError, match="too little text: .* fill 15 sequences of seq_len 4, and 16 are needed"):
            read(dataset=dataset, tokens=200, validation_tokens=4)
        assert read(dataset=dataset, tokens=60, validation_tokens=4).train.size == 60

    def test_nothing_held_out_is_refused(self, read, tmp_path):
        dataset = write_rows(tmp_path / "train.jsonl", [text for text in TEXTS if not is_held_out(text)])
        with pytest.raises(
            ValueError, match="the 0 held-out documents of .* do not fill one sequence .*add documents"
        ):
            read(dataset=dataset)


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
