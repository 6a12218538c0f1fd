import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from consistency_lens.data.corpus import (
    corpus_from_rows,
    document_hash,
    is_validation_document,
    pack,
    read_documents,
    split_by_document,
    tokenize_documents,
)

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    model = Tokenizer(models.WordLevel({"<s>": BOS, "</s>": EOS, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_read_documents_divides_at_separators(tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("one\nline two\n<|endoftext|>\n\n<|endoftext|>\ntwo\n<|endoftext|>", encoding="utf-8")
    assert read_documents(file) == ["one\nline two", "two"]


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
