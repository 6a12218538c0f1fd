"""One argument, three ways to activations: a cache on disk, a published one that is streamed, or the subject itself.

Training and evaluation open their rows here, so both see the same rows held out.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from .activation_cache import PROVENANCE_FILE, ActivationCache, check_provenance
from .activation_source import ActivationRows, ActivationSource, Rows
from .cache_building import build_activation_cache
from .on_the_fly import ContextRows, OnTheFlyActivations
from .streaming import StreamedActivations, open_stream
from .text_source import WHOLE, Corpus, Reader, read_corpus, sampled_corpus
from .tokenized_corpus import SPLITS

CACHE, ON_THE_FLY = "cache", "on_the_fly"
# Held-out rows, and training rows that controls are fitted to, of a stream: those are kept in memory.
ROWS_IN_MEMORY = 8192


@dataclass
class SourceArguments:
    """Which text is read, and how its activations come."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Folder that consistency-lens tokenize made, or text file with documents divided by lines of "
            "<|endoftext|>; unset: the subject writes its own."
        },
    )
    activations: str = field(
        default=CACHE,
        metadata={
            "help": "cache: of the dataset, kept under cache_dir; on_the_fly: the subject runs as rows are needed; or "
            "a cache that there is: its folder, or the Hub id of a published one, which is streamed."
        },
    )
    activations_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of published activations."}
    )
    stream_window: int = field(default=8, metadata={"help": "Streaming: files whose rows are mixed in memory."})
    num_documents: int = field(default=4000, metadata={"help": "Documents to sample where there is no dataset."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a document; the rest is cut."})
    positions_per_sequence: int = field(default=8, metadata={"help": "K, activations read from one document."})
    min_position: int = field(default=8, metadata={"help": "First position that may be read."})
    cache_dtype: str = field(default="float32", metadata={"help": "float16 or float32."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Corpus and activations; default <output_dir>/data."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of the documents held out, where the dataset does not say which."}
    )

    def __post_init__(self) -> None:
        for name in ("stream_window", "num_documents", "positions_per_sequence", "min_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.cache_dtype not in ("float16", "float32"):
            raise ValueError(f"cache_dtype must be float16 or float32, got {self.cache_dtype!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}; try 0.1")
        if self.max_length < self.min_position + 2:
            raise ValueError(
                f"max_length {self.max_length} leaves no position after min_position {self.min_position}; raise it"
            )
        if self.dataset is not None and not self.reads_text:
            raise ValueError(
                f"dataset: got {self.dataset!r}, but the activations {self.activations!r} are there already; pass one"
            )

    @property
    def reads_text(self) -> bool:
        """Whether activations are made from text, and not there already."""
        return self.activations in (CACHE, ON_THE_FLY)

    @property
    def is_streamed(self) -> bool:
        """Whether activations come from the Hub."""
        return not self.reads_text and not Path(self.activations).exists()

    @classmethod
    def recorded(cls, record: dict[str, Any], **changes: Any) -> "SourceArguments":
        """The arguments that a lens's provenance has, with changes."""
        # what it was called before
        record = {"dataset": record.get("text_file")} | record
        known = {key: value for key, value in record.items() if key in {item.name for item in fields(cls)}}
        return cls(**(known | changes))


class SplitRows(NamedTuple):
    """The rows of a run, split by document."""

    train: Any
    """What is trained on, a torch dataset."""
    true_text: Rows
    """Training rows with their activations, whose tails are true text: what controls are fitted to."""
    held_out: Rows
    """Rows of other documents, with their activations."""
    mean: torch.Tensor
    """(d,), of the training rows."""
    rms: float
    """Of the training rows."""
    provenance: dict[str, Any]
    """Of the training rows."""
    fraction: float | None = None
    """The documents whose hash lies in the lowest so much of its range were held out; None where they were chosen in
    another way."""

    def close(self) -> None:
        """Ends what is still being loaded."""
        if isinstance(self.train, StreamedActivations):
            self.train.close()


def open_rows(
    args: SourceArguments,
    reader: Reader,
    folder: Path,
    seed: int,
    pair_seed: int | None = None,
    pair_in_batch: bool = False,
    state: PartialState | None = None,
) -> SplitRows:
    """The rows that the arguments name, split by document; a cache is built first where it has to be.

    Args:
        reader: the subject whose activations they are.
        folder: where corpus and cache are kept.
        seed: of positions and sampled documents.
        pair_seed: of the pairing of A and A'; None for rows without A'.
        pair_in_batch: training rows bring no A', for another row of the batch has it; a stream's do all the same.
        state: with it, its processes share the building of a cache; all of them call this function.

    Raises:
        ValueError: if text or activations cannot be read, do not fit the subject, or cannot be split.
    """
    if args.is_streamed:
        return stream_rows(args, reader, seed, pair_seed)
    parts, fraction = open_parts(args, reader, folder, seed, state)
    train, held_out = split_parts(parts, args.validation_fraction)
    own_seed = None if pair_in_batch else pair_seed
    true_text = ActivationRows(train, own_seed)
    rows = ContextRows(train, own_seed) if args.activations == ON_THE_FLY else true_text
    held_out_rows = ActivationRows(held_out, pair_seed)
    return SplitRows(rows, true_text, held_out_rows, train.mean, train.rms, train.provenance, fraction)


def open_parts(
    args: SourceArguments, reader: Reader, folder: Path, seed: int, state: PartialState | None = None
) -> tuple[dict[str, ActivationSource], float | None]:
    """The parts of a source that is not streamed, `all` or `train` and `validation`; and `SplitRows.fraction`."""
    if not args.reads_text:
        caches = open_caches(Path(args.activations))
        for cache in caches.values():
            check_provenance(str(cache.path), cache.provenance, **reader.identity)
        return dict(caches), args.validation_fraction if WHOLE in caches else None
    if args.dataset is not None:
        corpus = read_corpus(args.dataset, reader, args.max_length)
    else:
        corpus = sampled_corpus(reader, args.num_documents, args.max_length, folder, seed, state)
    fraction = (corpus.facts or {}).get("validation_fraction", args.validation_fraction)
    if args.activations == ON_THE_FLY:
        return {part: part_on_the_fly(args, reader, corpus, part, seed) for part in corpus.parts}, fraction
    return {part: cached_part(args, reader, corpus, part, folder, seed, state) for part in corpus.parts}, fraction


def part_on_the_fly(
    args: SourceArguments, reader: Reader, corpus: Corpus, part: str, seed: int
) -> OnTheFlyActivations:
    """The activations of a part of a corpus, read from the subject when they are needed."""
    provenance = {
        "subject": reader.name,
        "subject_revision": reader.revision,
        "dataset": corpus.name,
        "dataset_revision": corpus.revision,
        "dataset_split": None if part == WHOLE else part,
        "corpus": corpus.facts,
    }
    return OnTheFlyActivations.from_corpus(
        reader.subject,
        corpus.parts[part],
        provenance | reader.identity,
        positions_per_sequence=args.positions_per_sequence,
        min_position=args.min_position,
        seed=seed,
    )


def cached_part(
    args: SourceArguments,
    reader: Reader,
    corpus: Corpus,
    part: str,
    folder: Path,
    seed: int,
    state: PartialState | None = None,
) -> ActivationCache:
    """The cache of a part of a corpus, built where it is not there already."""
    return build_activation_cache(
        reader.subject,
        corpus.parts[part],
        cache_folder(folder, reader.subject.layer, part),
        tokenizer=reader.tokenizer,
        subject_name=reader.name,
        subject_revision=reader.revision,
        subject_hash=reader.weights_hash,
        dataset_name=corpus.name,
        dataset_revision=corpus.revision,
        dataset_split=None if part == WHOLE else part,
        corpus_facts=corpus.facts,
        positions_per_sequence=args.positions_per_sequence,
        min_position=args.min_position,
        dtype=args.cache_dtype,
        seed=seed,
        state=state,
    )


def cache_folder(folder: Path, layer: int, part: str = WHOLE) -> Path:
    """Where a run keeps its cache, or those of a dataset that is split."""
    name = f"activations-layer{layer}"
    return folder / name if part == WHOLE else folder / f"{name}-splits" / part


def open_caches(path: Path) -> dict[str, ActivationCache]:
    """The cache in a folder, or those of both splits below it.

    Raises:
        ValueError: if there is neither, or one is not finished.
    """
    parts = [split for split in SPLITS if (path / split).is_dir()]
    if (path / PROVENANCE_FILE).is_file() or len(parts) < len(SPLITS):
        return {WHOLE: ActivationCache.open(path)}
    return {split: ActivationCache.open(path / split) for split in SPLITS}


def split_parts(parts: dict[str, Any], validation_fraction: float) -> tuple[ActivationSource, ActivationSource]:
    """(train, held-out): as the dataset was split, or by document hash; see `ActivationSource.held_out_from`.

    Raises:
        ValueError: if the parts share documents.
    """
    if WHOLE in parts:
        return parts[WHOLE].split_unseen(validation_fraction)
    train, validation = (parts[split] for split in SPLITS)
    check_disjoint(train.documents, validation.documents)
    return train, validation.held_out_from(train)


def check_disjoint(training: np.ndarray, held_out: np.ndarray) -> None:
    """Checks that no document (N,) of one side is on the other.

    Raises:
        ValueError: if there is one.
    """
    shared = np.intersect1d(training, held_out)
    if len(shared):
        raise ValueError(
            f"activations: train and validation share {len(shared)} documents, which are then not held out; build "
            "them from one corpus, which consistency-lens tokenize splits by document"
        )


def stream_rows(args: SourceArguments, reader: Reader, seed: int, pair_seed: int | None) -> SplitRows:
    """The rows of a published cache; those for evaluation are few and in memory."""
    train, validation = (
        open_stream(args.activations, split, args.activations_revision, pair_seed, args.stream_window)
        for split in SPLITS
    )
    for stream in (train, validation):
        check_provenance(args.activations, stream.provenance, **reader.identity)
    true_text, held_out = (stream.take(ROWS_IN_MEMORY, seed) for stream in (train, validation))
    validation.close()
    check_disjoint(*(np.array([row["document"] for row in rows]) for rows in (true_text, held_out)))
    return SplitRows(train, true_text, held_out, train.mean, train.rms, train.provenance)


def layer_of(args: SourceArguments) -> int | None:
    """The layer of activations that are there already; None for such as are to be made.

    Raises:
        ValueError: if they are not to be found.
    """
    return None if args.reads_text else provenance_of(args)["layer"]


def dataset_of(args: SourceArguments) -> str | None:
    """The data set that is read, or that activations which are there already were made of; None for text that the
    subject writes.

    Raises:
        ValueError: if they are not to be found.
    """
    return args.dataset if args.reads_text else provenance_of(args)["dataset"]


def provenance_of(args: SourceArguments) -> dict[str, Any]:
    """The provenance of activations that are there already."""
    if args.is_streamed:
        return open_stream(args.activations, SPLITS[0], args.activations_revision).provenance
    return next(iter(open_caches(Path(args.activations)).values())).provenance
