"""In which order training reads the rows of a source, so that rows that can share work meet in a batch.

Orders follow from a seed and the epoch, and are the same in every process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

Batch = dict[str, Any]


class LengthGroups(NamedTuple):
    """Rows of similar length are to meet in a step, so that little of a batch is padding.

    Attributes:
        lengths: (N,) tokens of the context of each row.
        rows_per_step: rows that all processes read at a time.
        window: steps among whose rows those of similar length are looked for.
    """

    lengths: np.ndarray
    rows_per_step: int
    window: int


class TogetherSampler(torch.utils.data.Sampler[int]):
    """Rows in random order, but up to `together` of one document follow each other, so that they share its context.

    Args:
        documents: (N,) the document of each row.
        together: how many rows of a document.
        seed: of the order.
        groups: where rows of similar length are to meet.
    """

    def __init__(self, documents: np.ndarray, together: int, seed: int, groups: LengthGroups | None = None) -> None:
        self.documents = documents
        self.together = together
        self.seed = seed
        self.groups = groups
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.documents)

    def set_epoch(self, epoch: int) -> None:
        """Another order in every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        runs = self.runs(generator)
        runs = runs.taken(generator.permutation(len(runs.sizes)))
        rows = runs.rows if self.groups is None else grouped(runs, self.groups, generator)
        return iter(rows.tolist())

    def runs(self, generator: np.random.Generator) -> "Runs":
        """The rows that follow each other in any order of these."""
        parts = shuffled_parts(self.documents, self.together, generator)
        return Runs(parts.rows, parts.sizes)


class MatesSampler(TogetherSampler):
    """Rows of two documents in turn: the one at 2i and the one at 2i + 1 are each other's A' (`WithMates`).

    Parts of up to `together` rows of a document are paired with parts of as many rows of another one. An epoch leaves
    out what finds no partner: of each size of parts one at most, where no document has more than half of them; it is
    another one in every epoch, and the number of rows stays the same.

    Raises:
        ValueError: if no two rows can be paired.
    """

    def __init__(self, documents: np.ndarray, together: int, seed: int, groups: LengthGroups | None = None) -> None:
        super().__init__(documents, together, seed, groups)
        self.num_rows = num_paired_rows(documents, together)
        if self.num_rows == 0:
            raise ValueError(
                f"activations: A' must come from another document, but the {len(documents)} rows have none to pair; "
                "add documents"
            )

    def __len__(self) -> int:
        return self.num_rows

    def runs(self, generator: np.random.Generator) -> "Runs":
        """Two parts of different documents, their rows in turn."""
        parts = shuffled_parts(self.documents, self.together, generator)
        starts = np.cumsum(parts.sizes) - parts.sizes
        rows, sizes = [], []
        for size in np.unique(parts.sizes):
            of_size = np.flatnonzero(parts.sizes == size)
            pairs = starts[of_size][pair_parts(parts.documents[of_size], generator)]  # (pairs, 2), first rows
            # the k-th row of the one, the k-th of the other, the next of the one, ...
            inside = pairs[:, None, :] + np.arange(size)[:, None]
            rows.append(parts.rows[inside].reshape(-1))
            sizes.append(np.full(len(pairs), 2 * size))
        return Runs(np.concatenate(rows), np.concatenate(sizes))


@dataclass(frozen=True)
class WithMates:
    """A collator that says which row of the batch has the A' of each: `mates` (B,) int64, for rows in the order of
    `MatesSampler`. A batch holds both rows of a pair, however many processes share the batches of a step.

    Args:
        collator: makes the batch of rows, such as `data.collator.ActivationCollator`.

    Raises:
        ValueError: for an odd number of rows.
    """

    collator: Callable[[Sequence[dict[str, Any]]], Batch]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        if len(rows) % 2:
            raise ValueError(
                f"A' is the other row of a pair, but a batch has {len(rows)} rows; make it an even number"
            )
        return self.collator(rows) | {"mates": torch.arange(len(rows)) ^ 1}


class Runs(NamedTuple):
    """Rows that stay beside each other, in R runs: `rows` (N,), run after run, and `sizes` (R,) of these."""

    rows: np.ndarray
    sizes: np.ndarray

    def taken(self, order: np.ndarray) -> "Runs":
        """The runs in another order (R,)."""
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return Runs(self.rows[np.argsort(np.repeat(place, self.sizes), kind="stable")], self.sizes[order])


def grouped(runs: Runs, groups: LengthGroups, generator: np.random.Generator) -> np.ndarray:
    """The rows of runs that are in random order, those of similar length in one step; the steps are in random order.

    A run counts as long as the longest of its rows.
    """
    starts = np.cumsum(runs.sizes) - runs.sizes
    longest = np.maximum.reduceat(groups.lengths[runs.rows], starts)
    window = starts // (groups.rows_per_step * groups.window)
    rows = runs.taken(np.lexsort((longest, window))).rows
    # what does not fill a step stays at the end
    full = len(rows) // groups.rows_per_step * groups.rows_per_step
    steps = generator.permutation(rows[:full].reshape(-1, groups.rows_per_step))
    return np.concatenate([steps.reshape(-1), rows[full:]])


class Parts(NamedTuple):
    """Rows of documents in P parts: `documents` (P,) and `sizes` (P,) of these, and their `rows` (N,) in order."""

    rows: np.ndarray
    documents: np.ndarray
    sizes: np.ndarray


def shuffled_parts(documents: np.ndarray, together: int, generator: np.random.Generator) -> Parts:
    """The rows of each document in random order, cut into parts of `together` rows; the last may have fewer.

    Args:
        documents: (N,) the document of each row.
    """
    names, groups, counts = np.unique(documents, return_inverse=True, return_counts=True)
    order = np.lexsort((generator.random(len(groups)), groups))
    num_parts = -(-counts // together)
    sizes = np.full(num_parts.sum(), together)
    sizes[np.cumsum(num_parts) - 1] = counts - together * (num_parts - 1)
    return Parts(order, np.repeat(names, num_parts), sizes)


def num_paired_rows(documents: np.ndarray, together: int) -> int:
    """How many rows of these documents (N,) an epoch of `MatesSampler` has."""
    parts = shuffled_parts(documents, together, np.random.default_rng(0))  # the sizes are those of any order
    rows = 0
    for size in np.unique(parts.sizes):
        _, counts = np.unique(parts.documents[parts.sizes == size], return_counts=True)
        rows += 2 * int(size) * num_pairs(counts)
    return rows


def num_pairs(counts: np.ndarray) -> int:
    """How many pairs of parts of different documents there are at most, of so many parts of each document."""
    total, largest = int(counts.sum()), int(counts.max())
    return min(total // 2, total - largest)


def pair_parts(documents: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Pairs (n, 2) of parts of different documents, as many as there can be, drawn at random.

    Args:
        documents: (P,) the document of each part.
    """
    names, groups, counts = np.unique(documents, return_inverse=True, return_counts=True)
    count = num_pairs(counts)
    # documents in random order, the parts of one beside each other; what a too large one has more is left out first
    place = generator.permutation(len(names))
    if counts.max() > count:
        place[counts.argmax()] = -1
    order = np.lexsort((generator.random(len(groups)), place[groups]))
    # no document has more than `count` of the last 2 * count parts, so parts that lie that far apart are of two
    chosen = order[len(order) - 2 * count :]
    return np.stack([chosen[:count], chosen[count:]], axis=1)
