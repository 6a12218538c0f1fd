"""Text to tokens: documents, the split by document, tokenising and packing.

A corpus is a `datasets.Dataset` with two columns: `input_ids` (list of int32), the tokens of one sequence, and
`document` (int64), a hash of the document's text. The train/validation split is made on that hash, never on rows,
so two sequences of one document always fall on the same side.

A packed corpus has several sequences in a row, end to end, and says where each starts and whose it is. It has no
`document`, so nothing can take a row for the text of one document; `unpacked` gives the sequences back.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CORPUS_FEATURES = Features({"input_ids": List(Value("int32")), "document": Value("int64")})
# of each row its sequences' first tokens (`starts`, from 0 on) and documents, in order
PACKED_FEATURES = Features(
    {"input_ids": List(Value("int32")), "starts": List(Value("int32")), "documents": List(Value("int64"))}
)
DOCUMENT_SEPARATOR = "<|endoftext|>"
BLOCK_ROWS = 10_000  # sequences whose lengths are read at a time


def read_documents(path: str | Path, separator: str = DOCUMENT_SEPARATOR) -> list[str]:
    """Reads a text file whose documents are divided by `separator` alone on its line; empty ones are dropped.

    A warning tells of a separator beside other text, which divides nothing.

    Raises:
        ValueError: if the file is missing, is not UTF-8, or holds no text.
    """
    documents = list(iterate_documents(path, separator))
    warn_of_separators(sum(lines_with_separator(document, separator) for document in documents), path, separator)
    if not documents:
        raise ValueError(f"corpus: {str(path)!r} holds no text; pass a file with at least one document")
    return documents


def iterate_documents(path: str | Path, separator: str = DOCUMENT_SEPARATOR) -> Iterator[str]:
    """The documents of `read_documents`, one at a time, so that a file may be larger than memory.

    Raises:
        ValueError: if the file is missing or is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"corpus: no text file at {str(path)!r}; pass the path of a UTF-8 text file")
    lines: list[str] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in chain(file, [separator]):
                if line.rstrip("\n") != separator:
                    lines.append(line)
                    continue
                document = "".join(lines).strip().removesuffix(separator).strip()
                lines = []
                if document:
                    yield document
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus: {str(path)!r} is no UTF-8 text ({error}); convert it") from error


def lines_with_separator(document: str, separator: str = DOCUMENT_SEPARATOR) -> int:
    """Lines of a document that hold the separator, which divides documents only where it is alone on its line."""
    return sum(separator in line for line in document.split("\n")) if separator in document else 0


def warn_of_separators(lines: int, source: str | Path, separator: str = DOCUMENT_SEPARATOR) -> None:
    """Logs a warning if there are lines of `lines_with_separator`."""
    if lines:
        logger.warning(
            "corpus: %d lines of %r hold %s and more, so it divides no documents there and is read as plain text; put "
            "it on a line of its own",
            *(lines, str(source), separator),
        )


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
    documents = corpus["document"][:]
    held_out = np.array([is_validation_document(doc, validation_fraction) for doc in documents], dtype=bool)
    if held_out.all() or not held_out.any():
        number = len(set(documents))
        if number == 1:
            raise ValueError(
                "corpus: its only document cannot be held out (one side is empty); add documents, in a text file with "
                f"lines of {DOCUMENT_SEPARATOR} alone between them"
            )
        raise ValueError(
            f"corpus: {number} documents cannot be split with validation_fraction={validation_fraction} (one side is "
            "empty); add documents or change the fraction"
        )
    return corpus.select(np.flatnonzero(~held_out)), corpus.select(np.flatnonzero(held_out))


def text_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each text, without BOS and EOS.

    A word in it that looks like a control token, such as `</s>`, is read as the characters that it is made of.
    """
    # not verbose, for it warns of every text beyond the model's context
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def with_boundaries(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's tokens between BOS and EOS, as far as the tokenizer has them."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return before + ids + after


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

    def rows() -> Iterator[dict]:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            for text, ids in zip(batch, text_tokens(batch, tokenizer), strict=True):
                yield {"input_ids": with_boundaries(ids, tokenizer)[:max_length], "document": document_hash(text)}

    return corpus_from_rows(rows())


def corpus_from_rows(rows: Iterable[dict]) -> Dataset:
    """Makes a corpus in memory from `{"input_ids", "document"}` rows."""
    rows = list(rows)
    columns = {name: [row[name] for row in rows] for name in CORPUS_FEATURES}
    return Dataset.from_dict(columns, features=CORPUS_FEATURES)


def sequence_lengths(corpus: Dataset) -> np.ndarray:
    """Tokens of each row, (N,) int64."""
    tables = corpus.select_columns("input_ids").with_format("arrow").iter(BLOCK_ROWS)
    lengths = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    return np.concatenate(lengths).astype(np.int64)


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


def pack_whole(
    corpus: Dataset, length: int, cache_file: Path, fingerprint: str, num_proc: int | None = None
) -> Dataset:
    """Packs sequences into rows of at most `length` tokens, in order, never cutting one: see `PACKED_FEATURES`.

    Args:
        corpus: its sequences have `length` tokens at most.
        cache_file: written by `datasets.map`, and memory-mapped by the result.
        fingerprint: of the result.
        num_proc: processes; None for this one.
    """
    first_rows: list[int] = []
    filled = 0
    lengths = sequence_lengths(corpus)
    for row, size in enumerate(lengths.tolist()):
        if not first_rows or filled + size > length:
            first_rows.append(row)
            filled = 0
        filled += size
    plan = Dataset.from_dict({"first": first_rows, "end": [*first_rows[1:], len(lengths)]})
    return plan.map(
        partial(_packed_rows, corpus=corpus),
        batched=True,
        remove_columns=plan.column_names,
        features=PACKED_FEATURES,
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        new_fingerprint=fingerprint,
        num_proc=num_proc,
        desc="packing",
    )


def _packed_rows(plan: dict[str, list[int]], corpus: Dataset) -> dict[str, list[Any]]:
    offset = plan["first"][0]
    rows = corpus[offset : plan["end"][-1]]
    packed: dict[str, list[Any]] = {name: [] for name in PACKED_FEATURES}
    for first, end in zip(plan["first"], plan["end"], strict=True):
        sequences = rows["input_ids"][first - offset : end - offset]
        packed["input_ids"].append(list(chain.from_iterable(sequences)))
        packed["starts"].append([0, *accumulate(len(ids) for ids in sequences[:-1])])
        packed["documents"].append(rows["document"][first - offset : end - offset])
    return packed


def unpacked(packed: Dataset, fingerprint: str) -> Dataset:
    """The corpus that was packed: one row a sequence, in order, a view of the same tokens.

    Args:
        packed: as it was loaded or made, without a selection of rows.
        fingerprint: of the result; `datasets` would read all tokens to find one.
    """
    schema = CORPUS_FEATURES.arrow_schema
    batches = []
    for batch in packed.data.to_batches():
        sizes = pc.list_value_length(batch["input_ids"]).to_numpy()
        counts = pc.list_value_length(batch["starts"]).to_numpy()
        row_starts = np.cumsum(sizes) - sizes
        starts = batch["starts"].flatten().to_numpy() + np.repeat(row_starts, counts)
        offsets = pa.array(np.append(starts, sizes.sum()).astype(np.int32))
        sequences = pa.ListArray.from_arrays(offsets, batch["input_ids"].flatten())
        columns = [sequences.cast(schema.field("input_ids").type), batch["documents"].flatten()]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    return Dataset(pa.Table.from_batches(batches, schema), fingerprint=fingerprint)
