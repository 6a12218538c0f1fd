"""A data set to a corpus on disk: rows, splits, statistics, chats, and what cannot be tokenized."""

import json
import logging
from pathlib import Path

import pytest
from tiny_lenses import tiny_tokenizer
from tiny_models import MAX_POSITIONS
from tokenized_texts import (
    BOS,
    EOS,
    FRACTION,
    TEMPLATE,
    TEXTS,
    arguments,
    by_document,
    make_subject,
    rows_of,
    subject,
    tokenize,
    words,
    write_rows,
)
from transformers import AutoTokenizer, ByT5Tokenizer

from consistency_lens.data.chat import chat_key
from consistency_lens.data.corpus import document_hash, is_validation_document
from consistency_lens.data.tokenized_corpus import open_corpus, open_rows
from consistency_lens.fingerprints import tokenizer_hash

__all__ = ["arguments", "subject", "tokenize"]

STORIES = Path(__file__).parents[2] / "examples" / "tiny_stories"


@pytest.fixture(scope="module")
def chat_subject(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return make_subject(tmp_path_factory.mktemp("chat_subject"), tokenizer)


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
