import logging

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from consistency_lens.data.corpus import (
    corpus_from_rows,
    document_hash,
    is_validation_document,
    iterate_documents,
    pack,
    pack_whole,
    read_documents,
    sequence_lengths,
    split_by_document,
    tokenize_documents,
    unpacked,
    with_boundaries,
)

BOS, EOS = 0, 1
LENGTHS = [3, 4, 1, 7, 2, 2, 2, 8, 5, 1]


@pytest.fixture(scope="module")
def tokenizer():
    model = Tokenizer(models.WordLevel({"<s>": BOS, "</s>": EOS, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_read_documents_divides_at_separators(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("one\nline two\n<|endoftext|>\n\n<|endoftext|>\ntwo\n<|endoftext|>", encoding="utf-8")
    assert read_documents(file) == ["one\nline two", "two"]


def test_separators_may_stand_anywhere_and_lines_may_end_as_on_windows(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_bytes(
        b"<|endoftext|>\r\none <|endoftext|> here\r\n<|endoftext|>\r\n<|endoftext|>\r\n\r\ntwo<|endoftext|>\r\n"
    )
    assert list(iterate_documents(file)) == ["one <|endoftext|> here", "two"]


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="stories.txt' is no UTF-8 text"):
        read_documents(file)


@pytest.mark.parametrize("content", [None, " \n"])
def test_read_documents_refuses_a_missing_or_empty_file(tmp_path, content):
    file = tmp_path / "stories.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="corpus: .*stories.txt"):
        read_documents(file)


def test_document_hash_is_stable_and_fits_int64():
    assert document_hash("a story") == 6090158919267051101
    assert document_hash([1, 2]) == document_hash(np.array([1, 2])) != document_hash([2, 1])
    assert all(0 <= document_hash(str(n)) < 2**63 for n in range(100))


def test_tokenized_documents_have_bos_and_eos(tokenizer):
    corpus = tokenize_documents(["a b", "b"], tokenizer)
    assert corpus["input_ids"][:] == [[BOS, 3, 4, EOS], [BOS, 4, EOS]]
    assert corpus["document"][:] == [document_hash("a b"), document_hash("b")]


@pytest.mark.parametrize(
    ("ids", "bounded"),
    [
        ([3], [BOS, 3, EOS]),
        ([3, EOS], [BOS, 3, EOS, EOS]),
        ([], [BOS, EOS]),
    ],
)
def test_boundaries_are_those_that_the_tokenizer_has(tokenizer, ids, bounded):
    assert with_boundaries(ids, tokenizer) == bounded


def byte_level(**special):
    """A tokenizer of bytes, as that of GPT-2 without merges: ids 0, 1 and so on for the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = list(dict.fromkeys(special.values()))
    core = Tokenizer(models.BPE({word: index for index, word in enumerate([*names, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(bos_token="<s>", eos_token="</s>"),
        byte_level(bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        ByT5Tokenizer(extra_ids=0),
    ],
    ids=["like llama", "like gpt2", "slow"],
)
def test_words_that_look_like_control_tokens_are_plain_text(tokenizer):
    texts = ["</s>", "<s> a </s> b </s>", "a<|endoftext|>b<|endoftext|>"]
    for text, ids in zip(texts, tokenize_documents(texts, tokenizer)["input_ids"], strict=True):
        first = 0 if tokenizer.bos_token_id is None else 1
        assert ids[:first] + ids[-1:] == with_boundaries([], tokenizer)
        inside = ids[first:-1]
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(inside)
        assert tokenizer.decode(inside) == text
    left_as_it_was = tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    assert left_as_it_was == [tokenizer.eos_token_id]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "stories.txt").write_text("one\n<|endoftext|>\ntwo\n", encoding="utf-8-sig")
    assert read_documents(tmp_path / "stories.txt") == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "lines"), [("one\n<|endoftext|>\ntwo", 0), ("a <|endoftext|> b\nc\n<|endoftext|>d", 2)]
)
def test_a_separator_beside_other_text_is_told_of(tmp_path, caplog, text, lines):
    (tmp_path / "stories.txt").write_text(text)
    with caplog.at_level(logging.WARNING):
        read_documents(tmp_path / "stories.txt")
    assert ("2 lines of " in caplog.text) == bool(lines) and len(caplog.records) == bool(lines)


def test_tokenized_documents_are_cut_at_max_length(tokenizer):
    assert tokenize_documents(["a b a b"], tokenizer, max_length=3)["input_ids"][:] == [[BOS, 3, 4]]


def test_tokenizing_nothing_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="got no documents"):
        tokenize_documents([], tokenizer)


def test_pack_keeps_every_bos_and_eos_in_order(tokenizer):
    blocks = pack(tokenize_documents(["a b", "b", "a a"], tokenizer), length=5)
    assert blocks.tolist() == [[BOS, 3, 4, EOS, BOS], [4, EOS, BOS, 3, 3]]
    assert blocks.dtype == np.int32


def test_pack_refuses_too_little_text(tokenizer):
    with pytest.raises(ValueError, match="3 tokens are too few for one block of 8"):
        pack(tokenize_documents(["a"], tokenizer), length=8)


@pytest.fixture
def corpus():
    """Sequences of `LENGTHS` tokens, all different, two of each document."""
    starts = np.cumsum([0, *LENGTHS])
    return corpus_from_rows(
        {"input_ids": list(range(start, start + length)), "document": document_hash(str(index // 2))}
        for index, (start, length) in enumerate(zip(starts, LENGTHS, strict=False))
    )


def test_packing_whole_fills_rows_in_order_and_keeps_their_starts(corpus, tmp_path):
    packed = pack_whole(corpus, 8, tmp_path / "packed.arrow", "fingerprint")
    assert packed["starts"][:] == [[0, 3, 7], [0], [0, 2, 4], [0], [0, 5]]
    assert packed["input_ids"][0] == list(range(8)) and packed["documents"][4] == corpus["document"][8:]
    assert "document" not in packed.column_names  # so that nothing takes a row for one document


@pytest.mark.parametrize("length", [8, 9, 20, 100])
def test_unpacking_gives_the_sequences_back(corpus, tmp_path, length):
    selected = corpus.select([9, 3, 7, 1, 0])  # as a side of a split is
    packed = pack_whole(selected, length, tmp_path / "packed.arrow", "fingerprint")
    assert sequence_lengths(packed).max() <= length
    rows = unpacked(packed, "other")
    assert rows[:] == selected[:] and rows.features == selected.features


def test_unpacking_reads_all_of_a_large_corpus_in_every_chunk(tmp_path):
    rows = [{"input_ids": [n, n + 1, n + 2], "document": n} for n in range(5000)]
    corpus = corpus_from_rows(rows)
    packed = pack_whole(corpus, 7, tmp_path / "packed.arrow", "fingerprint")
    assert packed.data.column("starts").num_chunks > 1
    assert unpacked(packed, "other")[:] == corpus[:]


def test_split_keeps_each_document_on_one_side():
    rows = [{"input_ids": [n], "document": document_hash(str(n % 40))} for n in range(120)]
    train, validation = split_by_document(corpus_from_rows(rows), 0.3)
    assert len(train) + len(validation) == 120
    assert set(train["document"]).isdisjoint(validation["document"])
    assert all(is_validation_document(document, 0.3) for document in validation["document"])


@pytest.mark.parametrize(("fraction", "message"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.5, "empty")])
def test_split_refuses_a_fraction_that_leaves_a_side_empty(fraction, message):
    with pytest.raises(ValueError, match=message):
        split_by_document(corpus_from_rows([{"input_ids": [1], "document": 5}]), fraction)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([5, 5, 5], "its only document cannot be held out .*; add documents"),
        ([5, 5, 6], "2 documents cannot be split"),
    ],
)
def test_a_split_that_fails_counts_documents_not_sequences(documents, message):
    rows = [{"input_ids": [1], "document": document} for document in documents]
    with pytest.raises(ValueError, match=message) as raised:
        split_by_document(corpus_from_rows(rows), 0.5)
    assert "\n" not in str(raised.value)
