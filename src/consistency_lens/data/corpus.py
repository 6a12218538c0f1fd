"""Text to tokens: documents, the split by document, tokenising and packing.

A corpus is a `datasets.Dataset` with two columns: `input_ids` (list of int32), the tokens of one sequence, and
`document` (int64), a hash of the document's text. The train/validation split is made on that hash, never on rows,
so two sequences of one document always fall on the same side.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

CORPUS_FEATURES = Features({"input_ids": List(Value("int32")), "document": Value("int64")})
DOCUMENT_SEPARATOR = "<|endoftext|>"


def read_documents(path: str | Path, separator: str = DOCUMENT_SEPARATOR) -> list[str]:
    """Reads a text file whose documents are divided by `separator` alone on its line; empty ones are dropped.

    Raises:
        ValueError: if the file is missing or holds no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"corpus: no text file at {str(path)!r}; pass the path of a UTF-8 text file")
    documents = [document.strip() for document in path.read_text(encoding="utf-8").split(f"\n{separator}\n")]
    documents = [document.removesuffix(separator).strip() for document in documents]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"corpus: {str(path)!r} holds no text; pass a file with at least one document")
    return documents


def document_hash(content: str | Sequence[int]) -> int:
    """A 63-bit hash of a document's text (or of its tokens, where there is no text), equal on every machine."""
    data = content.encode() if isinstance(content, str) else np.asarray(content, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def is_validation_document(document: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split: its hash lies in the lowest `fraction` of the range."""
    return document < fraction * 2**63


def split_by_document(corpus: Dataset, validation_fraction: float) -> tuple[Dataset, Dataset]:
    """Splits a dataset with a `document` column into (train, validation) by document hash.

    Raises:
        ValueError: if the fraction is outside (0, 1) or one side would be empty.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}; try 0.05")
    held_out = np.array([is_validation_document(doc, validation_fraction) for doc in corpus["document"]], dtype=bool)
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"corpus: {len(held_out)} sequences cannot be split with validation_fraction={validation_fraction} "
            "(one side is empty); add documents or change the fraction"
        )
    return corpus.select(np.flatnonzero(~held_out)), corpus.select(np.flatnonzero(held_out))


def tokenize_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, batch_size: int = 1000
) -> Dataset:
    """Tokenises each text as one sequence: BOS (if the tokenizer has one), the text, EOS, cut at `max_length` tokens.

    Raises:
        ValueError: if there are no texts.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("corpus: empty, got no documents; pass at least one text")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def rows() -> Iterator[dict]:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"], strict=True):
                yield {"input_ids": (bos + ids + eos)[:max_length], "document": document_hash(text)}

    return corpus_from_rows(rows())


def corpus_from_rows(rows: Iterable[dict]) -> Dataset:
    """Makes a corpus in memory from `{"input_ids", "document"}` rows."""
    rows = list(rows)
    columns = {name: [row[name] for row in rows] for name in CORPUS_FEATURES}
    return Dataset.from_dict(columns, features=CORPUS_FEATURES)


def pack(corpus: Dataset, length: int) -> np.ndarray:
    """Lays the sequences end to end and cuts them into blocks, shape (N, length), int32; the short rest is dropped.

    Every document keeps its own BOS and EOS inside the block, so the model sees where one ends.

    Raises:
        ValueError: if the corpus has fewer than `length` tokens.
    """
    tokens = np.fromiter(chain.from_iterable(corpus["input_ids"]), dtype=np.int32)
    if len(tokens) < length:
        raise ValueError(f"corpus: {len(tokens)} tokens are too few for one block of {length}; add text")
    return tokens[: len(tokens) // length * length].reshape(-1, length)
