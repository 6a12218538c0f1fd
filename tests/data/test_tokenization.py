"""A data set to a corpus on disk: rows, splits, settings, and what may go wrong, with a subject of a few words."""

import json
import logging
import os
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from filelock import FileLock
from tiny_lenses import tiny_tokenizer
from tiny_models import MAX_POSITIONS, tiny_model
from transformers import AutoTokenizer, ByT5Tokenizer

from consistency_lens.data import tokenization
from consistency_lens.data.chat import chat_key
from consistency_lens.data.corpus import document_hash, is_validation_document
from consistency_lens.data.tokenization import TokenizationArguments, tokenize_corpus
from consistency_lens.data.tokenized_corpus import corpus_origin, open_corpus, open_rows
from consistency_lens.fingerprints import tokenizer_hash

STORIES = Path(__file__).parents[2] / "examples" / "tiny_stories"
PAD, BOS, EOS = 0, 1, 2
FRACTION = 0.3
TEXTS = [" ".join(f"w{3 + (i * 7 + j) % 90}" for j in range(1 + i * 5 % 14)) for i in range(40)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {% if loop.last and 'thinking' in m %}{{ m['thinking'] }} "
    "{% endif %}{{ m['content'] }} {{ eos_token }}{% endfor %}"
)


def words(text):
    return [int(word[1:]) for word in text.split()]


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def make_subject(folder, tokenizer):
    tiny_model("llama").config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("subject"), tiny_tokenizer())


@pytest.fixture(scope="module")
def chat_subject(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return make_subject(tmp_path_factory.mktemp("chat_subject"), tokenizer)


@pytest.fixture
def arguments(subject, tmp_path):
    """Makes arguments for `TEXTS`, with changes."""
    dataset = write_rows(tmp_path / "data.jsonl", [{"text": text, "id": n} for n, text in enumerate(TEXTS)])
    given = {"dataset": dataset, "model": subject, "output_dir": str(tmp_path / "corpus")}
    return lambda **changes: TokenizationArguments(**{**given, "validation_fraction": FRACTION, **changes})


@pytest.fixture
def tokenize(arguments):
    return lambda **changes: tokenize_corpus(arguments(**changes))


def rows_of(path):
    """All rows of both sides, train first."""
    return [row for split in ("train", "validation") for row in open_corpus(path, split)]


def by_document(path):
    """Document -> its sequences, in order, of both sides."""
    found = {}
    for row in rows_of(path):
        found.setdefault(row["document"], []).append(row["input_ids"])
    return found


class TestRows:
    def test_a_document_is_a_row_between_bos_and_eos(self, tokenize):
        corpus = tokenize()
        assert by_document(corpus.path) == {document_hash(text): [[BOS, *words(text), EOS]] for text in TEXTS}
        assert [row["document"] for row in open_corpus(corpus.path, "train")] == [
            document_hash(text) for text in TEXTS if not is_validation_document(document_hash(text), FRACTION)
        ]

    def test_sides_are_by_hash_and_equal_texts_stay_together(self, tokenize, tmp_path):
        dataset = write_rows(tmp_path / "twice.jsonl", [{"text": text} for text in TEXTS * 2])
        corpus = tokenize(dataset=dataset)
        sides = [set(open_corpus(corpus.path, split)["document"]) for split in ("train", "validation")]
        assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == len(TEXTS)
        assert all(is_validation_document(document, FRACTION) for document in sides[1])
        assert len(rows_of(corpus.path)) == 2 * len(TEXTS)
        assert corpus.record["statistics"]["repeated"] == len(TEXTS)

    def test_a_long_document_is_cut(self, tokenize):
        corpus = tokenize(max_length=6)
        assert by_document(corpus.path) == {document_hash(text): [[BOS, *words(text), EOS][:6]] for text in TEXTS}

    def test_or_its_rest_becomes_sequences_of_the_same_document(self, tokenize):
        corpus = tokenize(max_length=6, long_documents="split")
        found = by_document(corpus.path)
        assert max(len(sequences) for sequences in found.values()) == 3
        for text in TEXTS:
            sequences = found[document_hash(text)]
            assert all(sequence[0] == BOS and len(sequence) > 1 for sequence in sequences)
            assert sum((sequence[1:] for sequence in sequences), []) == [*words(text), EOS]
            assert {len(sequence) for sequence in sequences[:-1]} <= {6} and len(sequences[-1]) <= 6

    def test_without_bos_a_long_document_is_split_into_what_it_holds(self, tokenize, tmp_path):
        model = make_subject(tmp_path / "other", tiny_tokenizer(bos=False))
        found = by_document(tokenize(max_length=6, long_documents="split", model=model).path)
        for text in TEXTS:
            sequences = found[document_hash(text)]
            assert sum(sequences, []) == [*words(text), EOS]
            assert {len(sequence) for sequence in sequences[:-1]} <= {6}

    @pytest.mark.parametrize("long_documents", ["cut", "split"])
    def test_packed_rows_hold_whole_sequences_of_one_side(self, tokenize, tmp_path, long_documents):
        plain = tokenize(max_length=12, long_documents=long_documents)
        packed = tokenize(
            max_length=12, long_documents=long_documents, packing=True, output_dir=str(tmp_path / "packed")
        )
        for split in ("train", "validation"):
            assert open_corpus(packed.path, split)[:] == open_corpus(plain.path, split)[:]
            rows = open_rows(packed.path, split)
            assert len(rows) < len(open_rows(plain.path, split)) and "document" not in rows.column_names
            for row in rows:
                assert len(row["input_ids"]) <= 12 and len(row["starts"]) == len(row["documents"])
                assert [row["input_ids"][start] for start in row["starts"]] == [BOS] * len(row["starts"])

    def test_text_files_are_read_too(self, tokenize, tmp_path):
        (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
        corpus = tokenize(dataset=str(tmp_path / "text.txt"))
        assert by_document(corpus.path) == {document_hash(text): [[BOS, *words(text), EOS]] for text in TEXTS}

    def test_empty_documents_are_skipped_and_counted(self, tokenize, tmp_path):
        rows = [{"text": text} for text in [*TEXTS, "", " \n", None]]
        corpus = tokenize(dataset=write_rows(tmp_path / "gaps.jsonl", rows))
        assert len(rows_of(corpus.path)) == len(TEXTS)
        assert corpus.record["statistics"]["skipped_empty"] == 3

    def test_words_like_control_tokens_are_no_boundaries(self, tokenize, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        texts = [f"<s> {text} </s> w1 </s>" for text in TEXTS]
        dataset = write_rows(tmp_path / "special.jsonl", [{"text": text} for text in texts])
        corpus = tokenize(dataset=dataset, model=make_subject(tmp_path / "stories", tokenizer))
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        found = by_document(corpus.path)
        assert len(found) == len(TEXTS)
        for text in texts:
            ((first, *ids, last),) = found[document_hash(text)]
            assert (first, last) == (bos, eos) and not {bos, eos} & set(ids) and tokenizer.decode(ids) == text

    def test_a_separator_beside_other_text_is_counted_and_told_of(self, tokenize, tmp_path, caplog):
        (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join([*TEXTS, "w3 <|endoftext|> w4\nw5"]))
        with caplog.at_level(logging.WARNING):
            corpus = tokenize(dataset=str(tmp_path / "text.txt"))
        assert corpus.record["statistics"]["separator_lines"] == 1
        assert caplog.text.count("1 lines of ") == 1 and "put it on a line of its own" in caplog.text


class TestTokenizers:
    @pytest.fixture
    def tokenize_with(self, tokenize, tmp_path):
        return lambda tokenizer: tokenize(model=make_subject(tmp_path / "other", tokenizer))

    def test_without_bos(self, tokenize_with):
        corpus = tokenize_with(tiny_tokenizer(bos=False))
        assert by_document(corpus.path)[document_hash(TEXTS[3])] == [[*words(TEXTS[3]), EOS]]

    def test_without_eos_and_padding(self, tokenize_with):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = tokenizer.pad_token = None
        corpus = tokenize_with(tokenizer)
        assert by_document(corpus.path)[document_hash(TEXTS[3])] == [[BOS, *words(TEXTS[3])]]

    def test_with_one_token_for_bos_eos_and_padding(self, tokenize_with):
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = tokenizer.pad_token = "</s>"
        corpus = tokenize_with(tokenizer)
        assert by_document(corpus.path)[document_hash(TEXTS[3])] == [[EOS, *words(TEXTS[3]), EOS]]

    def test_a_slow_one(self, tokenize_with):
        tokenizer = ByT5Tokenizer(extra_ids=0)
        corpus = tokenize_with(tokenizer)
        assert not tokenizer.is_fast
        expected = tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert by_document(corpus.path)[document_hash(TEXTS[3])] == [expected]


class TestStatistics:
    def test_count_documents_tokens_and_lengths(self, tokenize):
        corpus = tokenize(max_length=10)
        statistics = corpus.record["statistics"]
        lengths = sorted(2 + len(words(text)) for text in TEXTS)
        assert statistics["rows"] == statistics["documents"] == 40
        assert statistics["truncated"] == sum(length > 10 for length in lengths) > 0
        assert statistics["dropped_tokens"] == sum(max(0, length - 10) for length in lengths)
        assert statistics["document_tokens"]["min"] == 3 and statistics["document_tokens"]["max"] == 16
        assert statistics["document_tokens"]["median"] in (lengths[19], lengths[20])
        assert statistics["document_tokens"]["mean"] == pytest.approx(sum(lengths) / 40)
        for split in ("train", "validation"):
            rows = open_corpus(corpus.path, split)
            tokens = sum(len(ids) for ids in rows["input_ids"])
            assert statistics[split] == {
                "documents": len(rows), "sequences": len(rows), "rows": len(rows), "tokens": tokens
            }  # fmt: skip
        assert statistics["thinking"] == statistics["thinking_dropped"] == 0

    def test_split_documents_lose_nothing(self, tokenize):
        statistics = tokenize(max_length=10, long_documents="split").record["statistics"]
        assert statistics["truncated"] == statistics["dropped_tokens"] == 0
        assert statistics["train"]["sequences"] > statistics["train"]["documents"]

    def test_the_record_names_what_it_was_made_from(self, tokenize, subject):
        corpus = tokenize()
        assert corpus.record == json.loads((corpus.path / "tokenization.json").read_text())
        settings = corpus.record["settings"]
        assert settings["model"] == subject and settings["tokenizer_hash"] == tokenizer_hash(tiny_tokenizer())
        assert settings["text_column"] == "text" and settings["messages_column"] is None
        assert {"python", "datasets", "transformers", "tokenizers"} <= corpus.record["versions"].keys()


class TestChats:
    @pytest.fixture
    def chats(self, tmp_path):
        """Chats of two turns, with thinking in both; a template that renders it in the last one."""
        rows = [
            [
                {"role": "w10", "content": text},
                {"role": "w11", "content": "w12", "thinking": "w13"},
                {"role": "w10", "content": "w14"},
                {"role": "w11", "content": "w15", "thinking": "w16"},
            ]
            for text in TEXTS
        ]
        write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in [*rows, []]])
        return rows

    def test_are_rendered_and_their_thinking_is_counted(self, tokenize, chat_subject, chats, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            corpus = tokenize(dataset=str(tmp_path / "chats.jsonl"), messages_column="messages", model=chat_subject)
        assert by_document(corpus.path) == {
            document_hash(chat_key(chat)): [[BOS, 10, *words(text), EOS, 11, 12, EOS, 10, 14, EOS, 11, 16, 15, EOS]]
            for text, chat in zip(TEXTS, chats, strict=True)
        }
        statistics = corpus.record["statistics"]
        assert (statistics["thinking"], statistics["thinking_dropped"], statistics["skipped_empty"]) == (80, 40, 1)
        assert "40 of 80 messages with thinking lose it" in caplog.text

    def test_what_a_template_adds_is_all_that_is_added(self, tokenize, chats, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        corpus = tokenize(
            dataset=str(tmp_path / "chats.jsonl"),
            messages_column="messages",
            model=make_subject(tmp_path / "plain", tokenizer),
        )
        assert all(BOS not in row["input_ids"] and EOS not in row["input_ids"] for row in rows_of(corpus.path))
        assert set(by_document(corpus.path)) == {document_hash(chat_key(chat)) for chat in chats}

    def test_a_template_that_writes_the_date_is_recorded_with_it(self, tokenize, chats, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ strftime_now('w%d') }}" + TEMPLATE
        corpus = tokenize(
            dataset=str(tmp_path / "chats.jsonl"),
            messages_column="messages",
            model=make_subject(tmp_path / "dated", tokenizer),
        )
        assert len(corpus.record["rendered_on"]) == len("2000-01-01")
        assert set(by_document(corpus.path)) == {document_hash(chat_key(chat)) for chat in chats}

    def test_need_a_template(self, tokenize, chats, tmp_path):
        with pytest.raises(ValueError, match="has no chat template"):
            tokenize(dataset=str(tmp_path / "chats.jsonl"), messages_column="messages")

    def test_that_are_none_are_named_by_their_row(self, tokenize, chat_subject):
        with pytest.raises(ValueError, match="messages_column: row 0 of 'text' holds 'w3'; it must be a list"):
            tokenize(messages_column="text", model=chat_subject)


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


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dataset": ""}, "dataset: got none"),
            ({"model": ""}, "model: got none"),
            ({"output_dir": ""}, "output_dir: got none"),
            ({"text_column": "text", "messages_column": "messages"}, "got both"),
            ({"max_length": 1}, "max_length must be at least 2, got 1"),
            ({"long_documents": "burn"}, "long_documents must be one of cut, split, got 'burn'"),
            ({"packing": True}, "packing needs the length of a row"),
            ({"long_documents": "split"}, "long_documents split needs the length"),
            ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1"),
            ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
            ({"model": "no/such/model"}, "model: cannot load 'no/such/model'"),
            ({"max_length": MAX_POSITIONS + 1}, "max_length 129 is beyond the subject's context of 128"),
            ({"dataset": "no/such/data"}, "dataset: cannot read 'no/such/data'"),
            ({"text_column": "txt"}, "text_column: no column 'txt', .*; did you mean 'text'"),
            ({"text_column": "id"}, "text_column: row 0 of 'id' holds int, not text"),
            ({"dataset_split": "test"}, "split 'test'"),
            ({"dataset_revision": "v1"}, "dataset: got the revision 'v1', but '.*data.jsonl' is local and has none"),
            ({"dataset_config": "en"}, "dataset: got the configuration 'en', but '.*data.jsonl' is local"),
            ({"revision": "v1"}, "revision: got 'v1', but the model '.*' is local and has none"),
            ({"validation_fraction": 1e-9}, "one side is empty"),
        ],
    )
    def test_are_one_line_and_leave_nothing(self, tokenize, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message) as raised:
            tokenize(**changes)
        assert "\n" not in str(raised.value)
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]

    @pytest.mark.parametrize("num_proc", [1, 2])
    def test_a_text_beyond_the_context_needs_a_max_length(self, tokenize, tmp_path, num_proc):
        rows = [{"text": text} for text in [*TEXTS, "w3 " * (MAX_POSITIONS - 1)]]
        dataset = write_rows(tmp_path / "long.jsonl", rows)
        with pytest.raises(ValueError, match="row 40 of 'text' has 129 tokens, .* pass e.g. --max_length 128"):
            tokenize(dataset=dataset, num_proc=num_proc)
        assert tokenize(dataset=dataset, num_proc=num_proc, max_length=128).is_new

    def test_documents_that_are_all_empty(self, tokenize, tmp_path):
        with pytest.raises(ValueError, match="all 2 rows of column 'text' are empty"):
            tokenize(dataset=write_rows(tmp_path / "empty.jsonl", [{"text": ""}, {"text": " "}]))


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
