"""A corpus on disk, as `consistency-lens tokenize` leaves it: opened by its splits, with where it comes from.

A corpus folder holds `train` and `validation` (saved with `save_to_disk`, so they are memory-mapped) and
`tokenization.json`: the settings, the statistics and the versions.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from ..fingerprints import tokenizer_hash
from .corpus import PACKED_FEATURES, unpacked

TOKENIZATION_FILE = "tokenization.json"
SPLITS = ("train", "validation")
# Settings that provenance and cards of what is read on a corpus repeat.
TOLD_OF_CORPUS = (
    *("dataset_config", "dataset_split", "text_column", "messages_column", "chat_template_hash"),
    *("max_length", "long_documents", "packing", "validation_fraction"),
)


class CorpusOrigin(NamedTuple):
    """Where the sequences of a corpus come from."""

    name: str
    """The data set."""
    revision: str | None
    """Its revision on the Hub; None for local data."""
    facts: dict[str, Any]
    """How it was made into sequences: what of the settings shows in them, and the fingerprint."""


def open_corpus(path: str | Path, split: str) -> Dataset:
    """A side of a corpus on disk, memory-mapped: one row for each sequence, with `input_ids` and `document`.

    Of a packed corpus this is a view of its rows, cut where documents start, so that no context reaches into the
    document before.

    Raises:
        ValueError: if there is no finished corpus at `path`, it has no such split, or a file of it is damaged.
    """
    path = Path(path)
    rows = open_rows(path, split)
    if rows.features == PACKED_FEATURES:
        return unpacked(rows, f"{read_tokenization(path)['fingerprint']}_{split}_unpacked")
    return rows


def open_rows(path: str | Path, split: str) -> Dataset:
    """The rows of a side of a corpus as they are stored: those of `open_corpus`, or packed ones (`PACKED_FEATURES`).

    Raises:
        ValueError: as `open_corpus`.
    """
    path = Path(path)
    record = read_tokenization(path)
    if split not in SPLITS:
        raise ValueError(f"corpus: no split {split!r} in {str(path)!r}; pass {' or '.join(SPLITS)}")
    try:
        rows = load_from_disk(path / split)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"corpus: {str(path / split)!r} is damaged ({error}); delete the folder, tokenise") from error
    expected = record["statistics"][split]["rows"]
    if len(rows) != expected:
        raise ValueError(
            f"corpus: {str(path / split)!r} has {len(rows)} rows instead of {expected}; delete the folder, tokenise"
        )
    return rows


def corpus_origin(path: str | Path, tokenizer: PreTrainedTokenizerBase, model: str) -> CorpusOrigin:
    """Where a corpus on disk comes from, for those who read it.

    Args:
        tokenizer: of the subject that will read the corpus.
        model: the subject's name.

    Raises:
        ValueError: if it is no corpus, or was made with another tokenizer than the subject's.
    """
    record = read_tokenization(path)
    settings, own_hash = record["settings"], tokenizer_hash(tokenizer)
    if settings["tokenizer_hash"] != own_hash:
        raise ValueError(
            f"dataset: {str(path)!r} was made with the tokenizer of {settings['model']!r} (hash "
            f"{settings['tokenizer_hash'][:12]}), but that of {model!r} differs (hash {own_hash[:12]}); tokenise "
            f"again with --model {model}"
        )
    is_local = settings["dataset_hash"] is not None
    revision = None if is_local else record["dataset_commit"] or settings["dataset_revision"]
    told = {name: settings[name] for name in TOLD_OF_CORPUS} | {"rendered_on": record["rendered_on"]}
    return CorpusOrigin(settings["dataset"], revision, told | {"fingerprint": record["fingerprint"]})


def is_corpus(path: str | Path) -> bool:
    """Whether a finished corpus lies at `path`."""
    return (Path(path) / TOKENIZATION_FILE).is_file()


def read_tokenization(path: str | Path) -> dict[str, Any]:
    """The `tokenization.json` of a finished corpus.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    file = Path(path) / TOKENIZATION_FILE
    if not file.is_file():
        state = "is no finished corpus" if file.parent.is_dir() else "does not exist"
        raise ValueError(f"corpus: {str(path)!r} {state}; make one with: consistency-lens tokenize")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"corpus: {str(file)!r} is damaged ({error}); delete the folder, tokenise again") from error
