"""The texts that a report's explorer shows: those of a file, or documents that the training held out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data.activation_source import Rows, SourceRows, rows_at
from ..data.corpus import read_documents
from ..evaluation.saved_lens import SavedLensArguments, open_held_out, source_arguments
from ..explanation import text_ids
from ..modeling_consistency_lens import ConsistencyLensModel

Texts = Iterator[tuple[str, list[int]]]

# Looked at where rows can be had only with their activations, as from a stream.
ROWS_AT_MOST = 4096
TITLE = 60  # characters


def texts_of_file(lens: ConsistencyLensModel, path: str | Path) -> Texts:
    """Title and tokens of the texts of a file: a JSONL file's `text`, or the documents of a text file.

    Raises:
        ValueError: if the file is missing or broken, or a text is longer than the subject's context.
    """
    path = Path(path)
    texts = jsonl_texts(path) if path.suffix == ".jsonl" else read_documents(path)
    for text in texts:
        yield title_of(text), text_ids(lens, text)[0]


def jsonl_texts(path: Path) -> list[str]:
    """The `text` of each line.

    Raises:
        ValueError: if the file is missing, or a line is no object with one.
    """
    if not path.is_file():
        raise ValueError(f"texts: no file at {str(path)!r}; pass a text file, or JSONL with a 'text' in each line")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            texts.append(text_of_line(line, f"line {number} of {str(path)!r}"))
    if not texts:
        raise ValueError(f"texts: {str(path)!r} holds no text; pass a file with at least one")
    return texts


def text_of_line(line: str, place: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"texts: {place} is no JSON ({error})") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'texts: {place} has no \'text\'; each line is an object such as {{"text": "..."}}')
    return text


def title_of(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 4 * TITLE].split())
    return line if len(line) <= TITLE else line[: TITLE - 1] + "…"


def held_out_texts(lens: ConsistencyLensModel, args: SavedLensArguments, seed: int = 0) -> Texts:
    """Title and tokens of documents that the training held out, in an order drawn by `seed`.

    Raises:
        ValueError: if the activations of the training, or the rows held out, are not to be found.
    """
    rows = open_held_out(args, source_arguments(args, lens), lens).held_out
    tokenizer = lens.require_tokenizer()
    for ids in documents_of(rows, seed):
        yield title_of(str(tokenizer.decode(ids, skip_special_tokens=True))), ids


def documents_of(rows: Rows, seed: int) -> Iterator[list[int]]:
    """The longest known context of each document, in an order drawn by `seed`."""
    order = np.random.default_rng(seed)
    if isinstance(rows, SourceRows):
        source = rows.source
        for document in order.permutation(np.unique(source.documents)):
            contexts = source.contexts(np.flatnonzero(source.documents == document))
            yield [int(token) for token in max(contexts, key=len)]
        return
    longest: dict[int, Any] = {}
    for row in rows_at(rows, order.permutation(len(rows))[:ROWS_AT_MOST].tolist()):
        document, context = int(row["document"]), row["input_ids"]
        if len(context) > len(longest.get(document, [])):
            longest[document] = context
    yield from ([int(token) for token in context] for context in longest.values())
