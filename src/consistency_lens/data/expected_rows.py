"""How many rows a source will give, before any activation is read: from the text, or from caches that are there."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..context_length import context_length
from ..fingerprints import tokenizer_hash
from .activation_cache import PROVENANCE_FILE, check_provenance
from .activation_source import held_out_documents
from .cache_plan import plan_cache
from .corpus import sequence_lengths
from .sources import SourceArguments, cache_folder, open_caches
from .streaming import open_stream
from .text_source import WHOLE, Reader, read_corpus
from .tokenized_corpus import SPLITS

ROWS_PER_SHARD = 8192  # what a run's own cache is built with


@dataclass(frozen=True)
class ExpectedRows:
    """Rows that a run will train on, and hold out.

    Attributes:
        train, held_out: rows. Of the held-out ones those whose context training has seen are not left out here.
        exact: False where the subject has yet to write its documents: then the numbers are what there will be at most.
        text_tokens: tokens of the sequences that the subject reads to make the rows; None where they are made already.
        context_tokens: tokens of a context in the mean; None where that would mean reading the cache.
        cache: where the cache is, or will be; None without one of the run's own.
        is_cached: whether it is there already.
        documents: (train,) the document of each training row; None where that is not known yet, and for a stream.
    """

    train: int
    held_out: int
    exact: bool = True
    text_tokens: int | None = None
    context_tokens: float | None = None
    cache: Path | None = None
    is_cached: bool = False
    documents: np.ndarray | None = field(default=None, repr=False)


def expected_rows(args: SourceArguments, reader: Reader, folder: Path, seed: int) -> ExpectedRows:
    """The rows that `sources.open_rows` would give with the same arguments.

    Args:
        reader: the subject, whose weights are not needed.

    Raises:
        ValueError: as there, but for what only the subject's weights tell, and what the pass over the text would.
    """
    if args.is_streamed:
        return streamed_rows(args, reader)
    if not args.reads_text:
        return cached_rows(args, reader, Path(args.activations))
    own_cache = cache_folder(folder, reader.subject.layer) if args.activations == "cache" else None
    if own_cache is not None:
        for path in (own_cache, cache_folder(folder, reader.subject.layer, SPLITS[0]).parent):
            if (path / PROVENANCE_FILE).is_file() or (path / SPLITS[1] / PROVENANCE_FILE).is_file():
                return cached_rows(args, reader, path, own=True)
    if args.dataset is None:
        rows = args.num_documents * min(args.positions_per_sequence, args.max_length - 1 - args.min_position)
        held_out = round(rows * args.validation_fraction)
        tokens, context = args.num_documents * args.max_length, (args.min_position + args.max_length) / 2
        return ExpectedRows(rows - held_out, held_out, False, tokens, context, own_cache)
    return rows_of_text(args, reader, seed, own_cache)


def streamed_rows(args: SourceArguments, reader: Reader) -> ExpectedRows:
    """Of a published cache."""
    train, validation = (open_stream(args.activations, split, args.activations_revision) for split in SPLITS)
    for stream in (train, validation):
        check_provenance(args.activations, stream.provenance, **known_identity(reader))
    return ExpectedRows(len(train), len(validation))


def cached_rows(args: SourceArguments, reader: Reader, path: Path, own: bool = False) -> ExpectedRows:
    """Of the caches in a folder; `own` if it is the one that the run keeps its cache in."""
    caches = open_caches(path)
    for cache in caches.values():
        check_provenance(str(cache.path), cache.provenance, **known_identity(reader))
    parts = caches[WHOLE].split(args.validation_fraction) if WHOLE in caches else [caches[split] for split in SPLITS]
    place = path if own else None
    return ExpectedRows(len(parts[0]), len(parts[1]), cache=place, is_cached=own, documents=parts[0].documents)


def known_identity(reader: Reader) -> dict[str, object]:
    """What of `Reader.identity` needs no weights."""
    subject = reader.subject
    return {"tokenizer_hash": tokenizer_hash(reader.tokenizer), "layer": subject.layer, "width": subject.stream.width}


def rows_of_text(args: SourceArguments, reader: Reader, seed: int, own_cache: Path | None) -> ExpectedRows:
    """Of a corpus folder or a text file, which is tokenised for this."""
    config = reader.subject.model.config.get_text_config()
    corpus = read_corpus(str(args.dataset), reader, args.max_length)
    counts, tokens, context_tokens, documents = {True: 0, False: 0}, 0, 0.0, []
    for part, sequences in corpus.parts.items():
        plan = plan_cache(
            sequences,
            positions_per_sequence=args.positions_per_sequence,
            min_position=args.min_position,
            rows_per_shard=ROWS_PER_SHARD,
            seed=seed,
            vocab_size=config.vocab_size,
            max_length=context_length(config),
        )
        lengths = sequence_lengths(sequences)[plan.sequences]
        held_out = np.full(len(lengths), part == SPLITS[1])
        if part == WHOLE:
            held_out = held_out_documents(plan.documents, args.validation_fraction)
        for side in counts:
            counts[side] += int(plan.sequence_rows[held_out == side].sum())
        documents.append(np.repeat(plan.documents[~held_out], plan.sequence_rows[~held_out]))
        tokens += int(lengths.sum())
        # positions are uniform from min_position to two before the end
        context_tokens += float((plan.sequence_rows * (args.min_position + lengths) / 2).sum())
    rows = sum(counts.values())
    mean, of_rows = context_tokens / rows, np.concatenate(documents)
    return ExpectedRows(counts[False], counts[True], True, tokens, mean, own_cache, documents=of_rows)
