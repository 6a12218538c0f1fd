import logging
import tracemalloc
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from tiny_lenses import tiny_tokenizer
from tiny_models import MAX_POSITIONS, tiny_model
from token_texts import BOS, EOS, SEQ_LEN, TEXTS, UNKNOWN, add_bos, is_held_out, long_rows, side, words, write_rows

from consistency_lens.tuned_lens import token_blocks, token_stream
from consistency_lens.tuned_lens.token_arguments import TokenArguments
from consistency_lens.tuned_lens.token_blocks import BLOCKS_FILE, open_token_blocks


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

    def test_each_sequence_may_start_with_bos(self, read, tmp_path):
        texts = ["w10 w11 w12", "w11", "w10 w31 w32 w33 w34 w35", "w11 w41", "w16 w90 w91 w92"]
        assert [is_held_out(text) for text in texts] == [False] * 4 + [True]
        dataset = write_rows(tmp_path / "hand.jsonl", texts)
        bos = add_bos(tiny_tokenizer())
        blocks = read(dataset=dataset, tokens=16, validation_tokens=4, bos_per_sequence=True, tokenizer=bos)
        # a document that begins where a sequence does has its own
        expected = [[BOS, 10, 11, 12], [BOS, 11, BOS, 10], [BOS, 31, 32, 33], [BOS, 34, 35, BOS]]
        assert blocks.train.tolist() == expected
        assert blocks.validation.tolist() == [[BOS, 16, 90, 91]]
        assert blocks.description["sample_description"].endswith("packed to 4, each with BOS")

    def test_bos_of_a_tokenizer_that_adds_none_is_refused(self, read):
        with pytest.raises(ValueError, match="bos_per_sequence: this tokenizer starts no text with a BOS"):
            read(bos_per_sequence=True)

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
