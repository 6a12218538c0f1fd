"""What an activation cache will hold: which sequences of a corpus are read, at which positions, in which shard.

All of it follows from the corpus, the seed and the counts, before the subject runs. So each rank knows its own shards
without asking, and a build that was killed finds its place.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .activation_cache import token_lists
from .activation_source import BLOCK_ROWS
from .corpus import CORPUS_FEATURES

POSITIONS_RULE = "uniform without replacement in [min_position, length - 2]"
MAX_SHARD_TOKENS = 2**31 - 1  # Arrow counts the tokens of a shard in 32 bits


class ShardPlan(NamedTuple):
    """The sequences that a shard is read from; each field has one entry for each of them."""

    contexts: list[np.ndarray]
    """The tokens up to the last position, int32."""
    positions: list[np.ndarray]
    """Where activations are read, ascending, int64."""
    documents: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the shard: one for each position."""
        return sum(len(positions) for positions in self.positions)


@dataclass(frozen=True)
class CachePlan:
    """The sequences that a cache reads, cut into shards; a few bytes in memory for each sequence.

    Attributes:
        corpus: see `data.corpus`.
        positions_per_sequence: K.
        min_position: the first position that may be read.
        seed: of the positions.
        sequences: index in the corpus of each sequence that is long enough, ascending, int64.
        sequence_rows: rows of each of them, int64.
        documents: of each of them, int64.
        sequences_per_shard: how many of them a shard holds; the last may have fewer.
        num_skipped: sequences that are too short for one position.
        dataset_hash: sha256 over the lengths, documents and tokens of the whole corpus.
    """

    corpus: Dataset
    positions_per_sequence: int
    min_position: int
    seed: int
    sequences: np.ndarray
    sequence_rows: np.ndarray
    documents: np.ndarray
    sequences_per_shard: int
    num_skipped: int
    dataset_hash: str

    @cached_property
    def shard_rows(self) -> np.ndarray:
        """Rows of each shard, int64."""
        return np.add.reduceat(self.sequence_rows, np.arange(0, len(self.sequence_rows), self.sequences_per_shard))

    def shard(self, index: int) -> ShardPlan:
        """What shard `index` is read from."""
        start = index * self.sequences_per_shard
        return self.read(self.sequences[start : start + self.sequences_per_shard])

    def sample(self, count: int) -> ShardPlan:
        """At most `count` of the sequences, spread evenly over the corpus, with the positions that the cache has."""
        spread = np.linspace(0, len(self.sequences) - 1, min(count, len(self.sequences)))
        return self.read(self.sequences[spread.astype(np.int64)])

    def read(self, sequences: np.ndarray) -> ShardPlan:
        """What the rows of some of the sequences, given by their indices in the corpus, are read from."""
        table = _corpus_table(self.corpus, sequences)
        documents = table["document"].to_numpy()
        contexts, positions = [], []
        for tokens, document, index in zip(token_lists(table), documents, sequences, strict=True):
            drawn = draw_positions(
                len(tokens), int(document), int(index), self.positions_per_sequence, self.min_position, self.seed
            )
            contexts.append(tokens[: drawn[-1] + 1])
            positions.append(drawn)
        return ShardPlan(contexts, positions, documents)


def plan_cache(
    corpus: Dataset,
    *,
    positions_per_sequence: int,
    min_position: int,
    rows_per_shard: int,
    seed: int,
    vocab_size: int,
    max_length: int | None,
) -> CachePlan:
    """Reads a corpus once and plans the shards of its cache.

    Args:
        rows_per_shard: about how many rows a shard holds: those of whole sequences.
        vocab_size: tokens that the subject knows.
        max_length: tokens that the subject can read in one sequence, or None where there is no limit.

    Raises:
        ValueError: for tokens beyond the subject's vocabulary, sequences beyond its context, a corpus without a long
            enough sequence, and shards of more tokens than a file can hold.
    """
    digest, lengths, documents = hashlib.sha256(), [], []
    for start in range(0, len(corpus), BLOCK_ROWS):
        table = _corpus_table(corpus, range(start, min(start + BLOCK_ROWS, len(corpus))))
        tokens = table["input_ids"].combine_chunks().flatten().to_numpy()
        _check_tokens(tokens, vocab_size)
        lengths.append(pc.list_value_length(table["input_ids"]).to_numpy())
        documents.append(table["document"].to_numpy())
        for column in (lengths[-1], documents[-1], tokens):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
    length = np.concatenate(lengths)
    _check_lengths(length, min_position, rows_per_shard, max_length)
    sequences = np.flatnonzero(length >= min_position + 2)
    rows = np.minimum(positions_per_sequence, length[sequences].astype(np.int64) - 1 - min_position)
    return CachePlan(
        corpus=corpus,
        positions_per_sequence=positions_per_sequence,
        min_position=min_position,
        seed=seed,
        sequences=sequences,
        sequence_rows=rows,
        documents=np.concatenate(documents)[sequences],
        sequences_per_shard=max(1, rows_per_shard // positions_per_sequence),
        num_skipped=len(corpus) - len(sequences),
        dataset_hash=digest.hexdigest(),
    )


def draw_positions(
    length: int, document: int, index: int, positions_per_sequence: int, min_position: int, seed: int
) -> np.ndarray:
    """Up to K distinct positions of one sequence, ascending, uniform in [min_position, length - 2], (K,) int64."""
    available = length - 1 - min_position
    generator = np.random.default_rng([seed, document, index])
    chosen = generator.choice(available, size=min(positions_per_sequence, available), replace=False)
    return np.sort(chosen) + min_position


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"activation cache: the corpus has token ids from {tokens.min()} to {tokens.max()}, but the subject's "
            f"vocabulary is {vocab_size}; tokenise with the subject's own tokenizer"
        )


def _check_lengths(length: np.ndarray, min_position: int, rows_per_shard: int, max_length: int | None) -> None:
    longest = int(length.max())
    if longest < min_position + 2:
        raise ValueError(
            f"activation cache: the longest of {len(length)} sequences has {longest} tokens, too short for "
            f"min_position={min_position} and a next token; lower min_position or pass longer text"
        )
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"activation cache: the longest sequence has {longest} tokens, beyond the subject's context of "
            f"{max_length}; tokenise with max_length={max_length}"
        )
    if rows_per_shard * longest > MAX_SHARD_TOKENS:
        raise ValueError(
            f"activation cache: rows_per_shard={rows_per_shard} contexts of up to {longest} tokens are too many for "
            f"one file; lower rows_per_shard to {max(1, MAX_SHARD_TOKENS // longest)}"
        )


def _corpus_table(corpus: Dataset, indices: np.ndarray | range) -> pa.Table:
    """Rows of a corpus; those of a range are not copied."""
    return corpus.select_columns(list(CORPUS_FEATURES)).with_format("arrow")[indices]
