"""Rows of a batch whose context is the beginning of another's share one pass of the subject.

K activations of one sequence are K rows, each with its own context, of which all but the longest are beginnings of the
longest. Read together they cost one context, not K. `row_order.TogetherSampler` brings such rows into one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..subject import Passes

Batch = dict[str, Any]

# What a replaced token costs beside a token of a context: it has a gradient, and logits.
QUERY_COST = 4


@dataclass(frozen=True)
class SharedContexts:
    """A collator whose batches hold each context once.

    Beside what `collator` gives, where rows can share:

    | key | shape | |
    |---|---|---|
    | input_ids, attention_mask | (N, S) int64 | N <= B contexts, right-padded |
    | read_positions | (N, K) int64 | where they are read; 0 where a context has fewer than K rows |
    | row_contexts, row_slots | (B,) int64 | the context of each row, and its place among the positions of it |

    Args:
        collator: makes the batch of rows, such as `data.collator.ActivationCollator`.
    """

    collator: Callable[[Sequence[dict[str, Any]]], Batch]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return share_contexts(self.collator(rows))


class ReadPlaces(NamedTuple):
    """Where the subject is read for the rows of a batch."""

    positions: Tensor
    """(N, K) int64, indices of tokens in each of the N contexts."""
    contexts: Tensor | None
    """(B,) int64, the context of each row; None where row i is read in context i alone."""
    slots: Tensor | None
    """(B,) int64, which of the K positions a row is."""
    passes: Passes | None
    """Which of the contexts run together; None for all of them."""

    @classmethod
    def of(cls, batch: Batch) -> "ReadPlaces":
        """Those of a batch, shared or not."""
        if "read_positions" in batch:
            rows = (batch["row_contexts"], batch["row_slots"])
            return cls(batch["read_positions"], *rows, batch.get("context_passes"))
        return cls(batch["positions"][:, None], None, None, None)

    def of_rows(self, values: Tensor) -> Tensor:
        """What each row has of values (N, K, ...): (B, ...)."""
        return values[:, 0] if self.contexts is None else values[self.contexts, self.slots]

    def of_contexts(self, values: Tensor) -> Tensor:
        """Values (B, ...) of the rows, each at its place: (N, K, ...), 0 where there is no row."""
        if self.contexts is None:
            return values[:, None]
        empty = values.new_zeros(*self.positions.shape, *values.shape[1:])
        return empty.index_put((self.contexts, self.slots), values)


def share_contexts(batch: Batch) -> Batch:
    """The batch (on the CPU) with each context once; itself where no context is the beginning of another."""
    mask = batch["attention_mask"]
    owners = longest_continuations(batch["input_ids"].numpy(), mask.sum(dim=1).numpy())
    _, groups, sizes = np.unique(owners, return_inverse=True, return_counts=True)
    if len(sizes) == len(owners):
        return batch
    size = cheapest_group(sizes, mask.shape[1])
    # the place of each row among those of its group, which is divided where it is larger than that
    order = np.argsort(groups, kind="stable")
    place = np.empty_like(groups)
    place[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    _, firsts, contexts = np.unique(groups * len(groups) + place // size, return_index=True, return_inverse=True)
    slots = place % size
    positions = np.zeros((len(firsts), size), dtype=np.int64)
    positions[contexts, slots] = batch["positions"].numpy()
    kept = torch.from_numpy(owners[firsts])
    return batch | {
        "input_ids": batch["input_ids"][kept],
        "attention_mask": mask[kept],
        "read_positions": torch.from_numpy(positions),
        "row_contexts": torch.from_numpy(contexts),
        "row_slots": torch.from_numpy(slots),
    }


def longest_continuations(input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each row of right-padded ids (B, S) the row that goes on from its beginning, or itself, (B,) int64."""
    # big-endian, so that bytes are in the order of their tokens: what begins alike stands together when sorted
    texts = [row[:length].astype(">u4").tobytes() for row, length in zip(input_ids, lengths, strict=True)]
    owners = np.arange(len(texts))
    longest = -1
    for row in sorted(range(len(texts)), key=texts.__getitem__, reverse=True):
        if longest >= 0 and texts[longest].startswith(texts[row]):
            owners[row] = longest
        else:
            longest = row
    return owners


def cheapest_group(sizes: np.ndarray, length: int) -> int:
    """How many rows share a context at most: what makes the fewest tokens of groups of these sizes.

    All contexts are read at equally many positions, so one group that is much larger than the others is better read
    in parts.
    """
    most = np.arange(1, sizes.max() + 1)
    contexts = -(-sizes[:, None] // most).sum(axis=0)
    return int(most[np.argmin(contexts * (length + QUERY_COST * most))])
