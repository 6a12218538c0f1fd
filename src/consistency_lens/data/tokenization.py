"""A data set to a corpus on disk, tokenised once: the work of `consistency-lens tokenize`.

The folder (see `tokenized_corpus`) takes its name when it is whole, so it is never half-written.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset, DatasetInfo
from filelock import FileLock, Timeout
from transformers import AutoConfig, PreTrainedTokenizerBase

from .. import __version__
from ..atomic_write import sync_folder, write_json
from ..context_length import context_length
from ..fingerprints import tokenizer_hash
from .chat import chat_template, chat_template_hash
from .corpus import (
    CORPUS_FEATURES,
    pack_whole,
    sequence_lengths,
    split_by_document,
    warn_of_separators,
)
from .dataset_reading import check_column, check_source, hub_commit, local_hash, read_dataset
from .sequences import COUNTED_FEATURES, SequenceMaker, count
from .subject_loading import load_tokenizer, not_loaded
from .tokenized_corpus import SPLITS, TOKENIZATION_FILE, read_tokenization

logger = logging.getLogger(__name__)

FORMAT = 2
LONG_DOCUMENTS = ("cut", "split")


@dataclass
class TokenizationArguments:
    """What is tokenised, with whose tokenizer, and how documents become sequences."""

    dataset: str = field(
        default="",
        metadata={
            "help": "Hub id, folder, or file: JSON, JSONL, CSV, parquet, or text with lines of <|endoftext|> between "
            "documents."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the data set's configuration."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split that is read, such as train or train[:1000]."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a data set on the Hub."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the documents; default: text."})
    messages_column: str | None = field(
        default=None, metadata={"help": "Column with chats, rendered by the tokenizer's chat template, thinking too."}
    )
    model: str = field(default="", metadata={"help": "The subject, whose tokenizer is used: Hub id or folder."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the subject on the Hub."})
    output_dir: str = field(default="", metadata={"help": "Folder of the corpus."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence; unset: documents stay whole, and must fit the subject."}
    )
    long_documents: str = field(
        default="cut",
        metadata={
            "help": "Documents beyond max_length: cut (the rest is dropped) or split (it becomes sequences of the "
            "same document, each with BOS)."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack sequences whole into rows of at most max_length tokens, starts kept."},
    )
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of the documents held out."})
    num_proc: int = field(default=1, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        examples = {"dataset": "stories.txt", "model": "gpt2", "output_dir": "data/corpus"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")
        if self.text_column is not None and self.messages_column is not None:
            raise ValueError(
                f"text_column and messages_column: got both ({self.text_column!r}, {self.messages_column!r}); pass one"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}; 512 is a good start")
        if self.long_documents not in LONG_DOCUMENTS:
            raise ValueError(f"long_documents must be one of {', '.join(LONG_DOCUMENTS)}, got {self.long_documents!r}")
        if self.max_length is None and (self.packing or self.long_documents == "split"):
            name = "packing" if self.packing else "long_documents split"
            raise ValueError(f"{name} needs the length of a row, got no max_length; pass e.g. --max_length 512")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}; try 0.1")
        if self.num_proc < 1:
            raise ValueError(f"num_proc must be at least 1, got {self.num_proc}")

    @property
    def column(self) -> str:
        """The column that is read."""
        return self.messages_column or self.text_column or "text"


class TokenizedCorpus(NamedTuple):
    """A corpus on disk."""

    path: Path
    record: dict[str, Any]
    """The content of its `tokenization.json`."""
    is_new: bool
    """False if it was there already, made with the same settings."""


def tokenize_corpus(args: TokenizationArguments) -> TokenizedCorpus:
    """Tokenises a data set into a corpus folder; where the same corpus lies already, does nothing.

    A document is BOS, its text and EOS, or a chat as the template renders it: one sequence, or several where it is
    long and its rest is kept; they lie in order and have the same `document`. Its train/validation side is that of its
    hash. All files are written to `.<name>.partial` beside the folder, which then takes the name; `.<name>.lock` keeps
    a second call out, and the system ends it where this one is killed.

    Raises:
        ValueError: for a user's mistake: data, column or tokenizer that cannot be read, a revision of what is local,
            documents that do not fit the subject, all of them empty, a side of the split that is empty, a folder that
            holds something else, or another call at work on it.
        OSError: if the files cannot be written, as when the disk is full.
    """
    check_source(args.dataset, args.dataset_config, args.dataset_revision)
    tokenizer = checked_tokenizer(args)
    context = subject_context(args)
    path = Path(args.output_dir).resolve()
    settings = settings_of(args, tokenizer, context)
    if holds_corpus(path, settings):
        return TokenizedCorpus(path, read_tokenization(path), False)
    try:
        with _work_folder(path) as work:
            if holds_corpus(path, settings):  # made by another call since it was asked for
                return TokenizedCorpus(path, read_tokenization(path), False)
            record = _write_corpus(args, settings, tokenizer, context, work)
            sync_folder(work / "corpus")
            os.replace(work / "corpus", path)
    except OSError as error:
        raise OSError(
            f"corpus: cannot write to {str(path)!r}: {error.strerror or error}; make room (or mend what it says) and "
            "run the same again"
        ) from error
    return TokenizedCorpus(path, record, True)


@contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` for this call alone, removed at the end, as are folders that stayed empty.

    Raises:
        ValueError: if another call is at work there.
        OSError: if nothing can be written there.
    """
    new = [folder for folder in path.parents if not folder.exists()]
    work, lock_file = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(lock_file).acquire(blocking=False)
        except Timeout as error:
            raise ValueError(
                f"output_dir: another tokenize is at work in {str(path)!r}; wait for it, stop it, or choose another "
                "folder"
            ) from error
        with lock:
            try:
                shutil.rmtree(work, ignore_errors=True)  # left where a call was killed
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
                lock_file.unlink(missing_ok=True)
    finally:
        for folder in new:
            with suppress(OSError):  # it is not there, or holds the corpus
                folder.rmdir()


def checked_tokenizer(args: TokenizationArguments) -> PreTrainedTokenizerBase:
    """The subject's tokenizer.

    Raises:
        ValueError: if it cannot be loaded, a revision of a local one is asked for, or it has no chat template where
            messages are to be rendered.
    """
    if args.revision is not None and Path(args.model).is_dir():
        raise ValueError(
            f"revision: got {args.revision!r}, but the model {args.model!r} is local and has none; leave it out"
        )
    tokenizer = load_tokenizer(args.model, args.revision)
    if args.messages_column is not None:
        chat_template(tokenizer)
    return tokenizer


def subject_context(args: TokenizationArguments) -> int | None:
    """The positions that the subject has, in tokens; None where they are unbounded.

    Raises:
        ValueError: if its configuration cannot be loaded, or `max_length` is beyond its context.
    """
    try:
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    except (OSError, ValueError) as error:
        raise not_loaded(args.model, error) from error
    # Absent where positions are unbounded (ALiBi).
    context = context_length(config)
    if context is not None and args.max_length is not None and args.max_length > context:
        raise ValueError(f"max_length {args.max_length} is beyond the subject's context of {context}; lower it")
    return context


def settings_of(
    args: TokenizationArguments, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> dict[str, Any]:
    """All that decides what a corpus holds, but for the commit of a data set on the Hub, which may move."""
    is_chat = args.messages_column is not None
    return {
        "format": FORMAT,
        "dataset": args.dataset,
        "dataset_config": args.dataset_config,
        "dataset_split": args.dataset_split,
        "dataset_revision": args.dataset_revision,
        "dataset_hash": local_hash(args.dataset),
        "text_column": None if is_chat else args.column,
        "messages_column": args.messages_column,
        "model": args.model,
        "revision": args.revision,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "chat_template_hash": chat_template_hash(tokenizer) if is_chat else None,
        "max_length": args.max_length,
        # which documents must fit that are not cut
        "context": context if args.max_length is None else None,
        "long_documents": args.long_documents,
        "packing": args.packing,
        "validation_fraction": args.validation_fraction,
    }


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the paths of local data and a local subject: hashes stand for these, wherever they lie."""
    paths = {"dataset"} if settings["dataset_hash"] is not None else set()
    if Path(settings["model"]).is_dir():
        paths.add("model")
    return {name: value for name, value in settings.items() if name not in paths}


def holds_corpus(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the corpus of these settings lies at `path`; False if nothing lies there.

    Raises:
        ValueError: if a corpus with other settings lies there, or other files, or the data set itself.
    """
    if Path(settings["dataset"]).is_dir() and path.is_relative_to(Path(settings["dataset"]).resolve()):
        raise ValueError(f"output_dir: {str(path)!r} lies in the data set {settings['dataset']!r}; choose another")
    if (path / TOKENIZATION_FILE).is_file():
        found = read_tokenization(path)["settings"]
        for name, value in deciding(settings).items():
            if found.get(name) != value:
                raise ValueError(
                    f"output_dir: {str(path)!r} was made with {name} {found.get(name)!r}, now it is {value!r}; choose "
                    "another folder or delete that one"
                )
        return True
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output_dir: {str(path)!r} holds other files; choose a new folder")
    return False


def _write_corpus(
    args: TokenizationArguments,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    work: Path,
) -> dict[str, Any]:
    """Writes the whole corpus to `work/corpus` and returns its record."""
    commit = hub_commit(args.dataset, args.dataset_revision)
    revision = commit or args.dataset_revision
    source = read_dataset(args.dataset, args.dataset_config, args.dataset_split, revision, cache_dir=work / "source")
    check_column(source, args.column, "text_column" if args.messages_column is None else "messages_column")
    fingerprint = hashlib.sha256(json.dumps([deciding(settings), commit]).encode()).hexdigest()[:32]
    sequences = _sequences(args, source, tokenizer, context, work, fingerprint)
    statistics = count(sequences, len(source))
    _warn_of_dropped_thinking(args, statistics)
    warn_of_separators(statistics["separator_lines"], args.dataset)
    corpus = Dataset(
        sequences.select_columns(list(CORPUS_FEATURES)).data,
        DatasetInfo(features=CORPUS_FEATURES),  # without what is known of the source, such as the paths of its files
        fingerprint=fingerprint,
    )
    for split, part in zip(SPLITS, split_by_document(corpus, args.validation_fraction), strict=True):
        rows = part
        if args.packing and args.max_length is not None:
            file = _folder(work / "packed") / f"{split}.arrow"
            rows = pack_whole(part, args.max_length, file, f"{fingerprint}_{split}", _processes(args))
        rows.save_to_disk(work / "corpus" / split)
        statistics[split] = {
            "documents": len(np.unique(part["document"][:])),
            "sequences": len(part),
            "rows": len(rows),
            "tokens": int(sequence_lengths(part).sum()),
        }
    record = {
        "settings": settings,
        "dataset_commit": commit,
        "rendered_on": date.today().isoformat() if _reads_the_date(args, tokenizer) else None,
        "fingerprint": fingerprint,
        "statistics": statistics,
        "versions": _versions(),
    }
    write_json(work / "corpus" / TOKENIZATION_FILE, record)
    return record


def _sequences(
    args: TokenizationArguments,
    source: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    work: Path,
    fingerprint: str,
) -> Dataset:
    """All sequences of a data set, with what is counted of their documents."""
    maker = SequenceMaker(
        tokenizer,
        args.column,
        is_chat=args.messages_column is not None,
        max_length=args.max_length,
        keep_rest=args.long_documents == "split",
        context=context,
    )
    sequences = source.select_columns([args.column]).map(
        maker,
        batched=True,
        with_indices=True,
        remove_columns=[args.column],
        features=COUNTED_FEATURES,
        cache_file_name=str(_folder(work / "sequences") / "sequences.arrow"),
        load_from_cache_file=False,
        # given, so that `datasets` does not hash the tokenizer, which changes as it works
        new_fingerprint=fingerprint,
        num_proc=_processes(args),
        desc="tokenising",
    )
    if len(sequences) == 0:
        raise ValueError(f"dataset: all {len(source)} rows of column {args.column!r} are empty; pass another column")
    return sequences


def _processes(args: TokenizationArguments) -> int | None:
    """None for this process alone: then a fast tokenizer may use all cores by its threads."""
    return args.num_proc if args.num_proc > 1 else None


def _warn_of_dropped_thinking(args: TokenizationArguments, statistics: dict[str, Any]) -> None:
    if statistics["thinking_dropped"]:
        logger.warning(
            "%d of %d messages with thinking lose it: the chat template of %s leaves it out there (many templates "
            "render it in the last turn alone)",
            statistics["thinking_dropped"],
            statistics["thinking"],
            args.model,
        )


def _reads_the_date(args: TokenizationArguments, tokenizer: PreTrainedTokenizerBase) -> bool:
    return args.messages_column is not None and "strftime_now" in chat_template(tokenizer)


def _versions() -> dict[str, str]:
    modules = (transformers, tokenizers, datasets, pa, np)
    versions = {"python": platform.python_version(), "consistency_lens": __version__}
    return versions | {module.__name__: module.__version__ for module in modules}


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
