"""Where activations come from, seen from training and evaluation: rows by index, split and paired by document.

A row is an activation with its context (tokens 0..P), its position P and its document. It may lie on disk
(`activation_cache`), or be computed when it is asked for (`on_the_fly`); who reads it need not know.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.utils.data import DataLoader

from .corpus import is_validation_document
from .moments import Moments, streaming_moments

HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, of well mixed bits
BLOCK_ROWS = 8192  # rows held in memory at a time
READ_TOGETHER = 256  # rows, of a few that are picked


class ActivationSource(ABC):
    """Rows of activations of one layer, or a part of them.

    Args:
        provenance: what the rows were made from and with; a part shares the whole's.
        rows: (N,) int64, the index of each row in the whole.
        training_part: for held-out rows, those whose `mean` and `rms` they are measured by.
    """

    def __init__(
        self, provenance: dict[str, Any], rows: np.ndarray, training_part: "ActivationSource | None" = None
    ) -> None:
        self.provenance = provenance
        self.rows = rows
        self.training_part = training_part

    def __len__(self) -> int:
        return len(self.rows)

    @property
    @abstractmethod
    def documents(self) -> np.ndarray:
        """Document hash of every row, (N,) int64."""

    @abstractmethod
    def contexts(self, indices: np.ndarray) -> list[np.ndarray]:
        """Tokens 0..P of the given rows of this part, int32."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the context of every row, (N,) int64."""
        blocks = range(0, len(self), BLOCK_ROWS)
        contexts = (self.contexts(np.arange(i, min(i + BLOCK_ROWS, len(self)))) for i in blocks)
        return np.array([len(context) for block in contexts for context in block])

    @abstractmethod
    def activations(self, indices: np.ndarray) -> np.ndarray:
        """Activations of the given rows of this part, (B, d)."""

    @abstractmethod
    def part(self, rows: np.ndarray, training_part: "ActivationSource | None" = None) -> Self:
        """The rows with these indices in the whole."""

    @abstractmethod
    def own_moments(self) -> Moments:
        """Mean and RMS of these rows."""

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Activations (B, d) and contexts of the given rows."""
        return self.activations(indices), self.contexts(indices)

    @property
    def mean(self) -> torch.Tensor:
        """Mean activation, (d,) float32: of all rows, or of the training rows for both sides of a split."""
        return torch.tensor(self._moments.mean, dtype=torch.float32)

    @property
    def rms(self) -> float:
        """Root mean square over rows and dimensions of A - mean, of the same rows as `mean`."""
        return self._moments.rms

    @cached_property
    def _moments(self) -> Moments:
        return self.own_moments() if self.training_part is None else self.training_part._moments

    def moments_of_all(self) -> Moments:
        """Mean and RMS of these rows, by reading them all."""
        blocks = range(0, len(self), BLOCK_ROWS)
        return streaming_moments(self.activations(np.arange(i, min(i + BLOCK_ROWS, len(self)))) for i in blocks)

    def split(self, validation_fraction: float) -> tuple[Self, Self]:
        """Splits into (train, validation) by document hash; `mean` and `rms` of both are those of the training rows.

        Raises:
            ValueError: if the fraction is outside (0, 1) or one side would be empty.
        """
        held_out = held_out_documents(self.documents, validation_fraction)
        train = self.part(self.rows[~held_out])
        return train, self.part(self.rows[held_out], train)

    def held_out_from(self, train: "ActivationSource") -> Self:
        """These rows as what is held out from the training on others.

        Rows whose whole context is also the beginning of a training context are left out: documents may share their
        first words (those that a model writes often do), and then a held-out row is a training row over again, and
        what is measured on it is memory. `mean` and `rms` are those of the training rows.

        Raises:
            ValueError: if the rows left are of fewer than two documents.
        """
        wanted = np.concatenate([ends for ends, _ in self._context_hashes()])
        seen = [np.intersect1d(beginnings, wanted) for _, beginnings in train._context_hashes()]
        unseen = self.part(self.rows[~np.isin(wanted, np.concatenate(seen))], train)
        if len(np.unique(unseen.documents)) < 2:
            raise ValueError(
                f"activations: {len(unseen)} of {len(self)} held-out rows have contexts of their own, from fewer than "
                "two documents; add documents or hold out more (validation_fraction)"
            )
        return unseen

    def split_unseen(self, validation_fraction: float) -> tuple[Self, Self]:
        """As `split`, with the held-out rows of `held_out_from` alone.

        Raises:
            ValueError: see there.
        """
        train, held_out = self.split(validation_fraction)
        return train, held_out.held_out_from(train)

    def _context_hashes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For blocks of rows: hashes of their contexts (n,), and of all beginnings of these, flat."""
        for start in range(0, len(self), BLOCK_ROWS):
            contexts = self.contexts(np.arange(start, min(start + BLOCK_ROWS, len(self))))
            lengths = np.array([len(context) for context in contexts])
            hashes = np.zeros((len(contexts), lengths.max()), dtype=np.uint64)
            inside = np.arange(lengths.max()) < lengths[:, None]
            hashes[inside] = np.concatenate(contexts).astype(np.uint64) + np.uint64(1)
            for index in range(1, hashes.shape[1]):
                hashes[:, index] += hashes[:, index - 1] * HASH_MULTIPLIER  # wraps modulo 2^64
            yield hashes[np.arange(len(contexts)), lengths - 1], hashes[inside]

    def pair(self, seed: int) -> np.ndarray:
        """For every row the index (in this part) of the row that gives A': see `pair_documents`."""
        return pair_documents(self.documents, seed)


def held_out_documents(documents: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Which of the rows of these documents (N,) are held out, (N,) bool: by document hash.

    Raises:
        ValueError: if the fraction is outside (0, 1) or one side would be empty.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}; try 0.05")
    held_out = np.array([is_validation_document(document, validation_fraction) for document in documents.tolist()])
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"activations: {len(np.unique(documents))} documents cannot be split with "
            f"validation_fraction={validation_fraction} (one side is empty); add documents or change the fraction"
        )
    return held_out


def pair_documents(documents: np.ndarray, seed: int) -> np.ndarray:
    """For every row the index of the row that gives its A', (N,) int64, never one of its own document.

    A permutation, so that every row serves once. Where one document holds more than half of the rows no such
    permutation exists: then the rows of the others serve it several times.

    Args:
        documents: of each row, (N,) int64.

    Raises:
        ValueError: if all rows come from one document.
    """
    names, group, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"activations: A' must come from another document, but all {len(documents)} rows are of one; add documents"
        )
    generator = np.random.default_rng(seed)
    num_rows, largest = len(documents), int(sizes.max())
    partners = np.empty(num_rows, dtype=np.int64)
    if 2 * largest <= num_rows:
        # Documents one after the other, in random order: a rotation by at least the largest one leaves each.
        order = np.lexsort((generator.random(num_rows), generator.permutation(len(names))[group]))
        partners[order] = np.roll(order, -generator.integers(largest, num_rows - largest + 1))
        return partners
    inside = generator.permutation(np.flatnonzero(group == sizes.argmax()))
    outside = generator.permutation(np.flatnonzero(group != sizes.argmax()))
    partners[inside] = np.resize(outside, len(inside))
    partners[outside] = inside[: len(outside)]
    return partners


class Rows(Protocol):
    """Rows with their activations, each a dict that `data.collator.ActivationCollator` understands."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def rows_at(rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Some of the `Rows`, in this order, read together where they can be."""
    # A loader knows how. It draws a seed for its workers, here not from the global state.
    loader = DataLoader(rows, READ_TOGETHER, sampler=indices, collate_fn=list, generator=torch.Generator())
    return [row for batch in loader for row in batch]


class SourceRows(torch.utils.data.Dataset, ABC):
    """A source as a torch dataset, with a partner for each row where A' is wanted.

    Args:
        source: where the rows come from.
        pair_seed: of the pairing; None for rows without A'.

    Raises:
        ValueError: with `pair_seed`, if all rows come from one document.
    """

    def __init__(self, source: ActivationSource, pair_seed: int | None = None) -> None:
        self.source = source
        self.partners = None if pair_seed is None else source.pair(pair_seed)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, read together: what torch's DataLoader calls where it exists."""
        columns = self.columns(np.asarray(indices))
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @abstractmethod
    def columns(self, chosen: np.ndarray) -> dict[str, Any]:
        """The given rows, as columns of one length."""

    def known(self, chosen: np.ndarray, contexts: list[np.ndarray]) -> dict[str, Any]:
        """The columns that need no activation: `input_ids`, `position`, `document` and `row`, the index in the whole
        source, which is the key of the row's sampling noise."""
        return {
            "input_ids": contexts,
            "position": [len(context) - 1 for context in contexts],
            "document": self.source.documents[chosen],
            "row": self.source.rows[chosen],
        }


class ActivationRows(SourceRows):
    """The rows of a source with their activations: `activation` (d,), `input_ids` (P + 1,) int32, `position`,
    `document`, `row` and, with `pair_seed`, `other_activation` (d,), the A' of `pair_documents`."""

    def columns(self, chosen: np.ndarray) -> dict[str, Any]:
        """The given rows, as columns of one length."""
        activations, contexts = self.source.read(chosen)
        columns = {"activation": activations, **self.known(chosen, contexts)}
        if self.partners is not None:
            columns["other_activation"] = self.source.activations(self.partners[chosen])
        return columns
