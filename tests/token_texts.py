"""Texts of a made-up vocabulary, on the two sides of a split, and readers of their token blocks."""

import json
from itertools import chain

import pytest
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from tokenizers import processors

from consistency_lens.data.corpus import document_hash, is_validation_document
from consistency_lens.tuned_lens.token_arguments import TokenArguments
from consistency_lens.tuned_lens.token_blocks import read_token_blocks

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
