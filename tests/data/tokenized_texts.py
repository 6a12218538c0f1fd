"""Texts to tokenize with a subject of a few words, and the rows of the corpus."""

import json

import pytest
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data.tokenization import TokenizationArguments, tokenize_corpus
from consistency_lens.data.tokenized_corpus import open_corpus

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
