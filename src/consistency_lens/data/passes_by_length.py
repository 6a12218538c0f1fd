"""Contexts of a batch that are of similar length run in a pass of their own, cut to it: less of a batch is padding.

Positions are drawn anywhere in a sequence, so contexts have all lengths, and padded to the longest of a batch nearly
half of their tokens would be padding. `row_order.LengthGroups` chooses which rows meet in a step; this takes them as
they come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..subject import Passes
from .shared_contexts import ReadPlaces

Batch = dict[str, Any]


@dataclass(frozen=True)
class PassesByLength:
    """A collator whose batches say which of their contexts run together.

    Beside what `collator` gives, and with `input_ids`, `attention_mask` and the keys of `SharedContexts` in another
    order, `context_passes` is a tuple of (contexts, tokens): so many contexts, cut to so many tokens, are a pass.

    Args:
        collator: makes the batch of rows, such as `data.shared_contexts.SharedContexts`.
        pass_cost: how many tokens of padding are better than another pass.
    """

    collator: Callable[[Sequence[dict[str, Any]]], Batch]
    pass_cost: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return read_by_length(self.collator(rows), self.pass_cost)


def read_by_length(batch: Batch, pass_cost: int) -> Batch:
    """The batch (on the CPU) with its contexts ordered by length and divided into passes; itself where one is best."""
    lengths = batch["attention_mask"].sum(dim=1).numpy()
    order = np.argsort(-lengths, kind="stable")
    passes = cheapest_passes(lengths[order], pass_cost)
    if len(passes) == 1:
        return batch
    place = torch.from_numpy(np.argsort(order))
    places = ReadPlaces.of(batch)
    shared = places.contexts is not None and places.slots is not None
    return batch | {
        "input_ids": batch["input_ids"][order],
        "attention_mask": batch["attention_mask"][order],
        "read_positions": places.positions[order],
        "row_contexts": place[places.contexts] if shared else place,
        "row_slots": places.slots if shared else torch.zeros_like(place),
        "context_passes": passes,
    }


def cheapest_passes(lengths: np.ndarray, pass_cost: int) -> Passes:
    """Divides contexts into passes that are cheapest together, each costing its tokens, padded, and `pass_cost`.

    Args:
        lengths: (N,) tokens of each context, the longest first.
    """
    count = len(lengths)
    costs, starts = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for stop in range(1, count + 1):
        # the last pass of the first `stop` contexts begins anywhere before, and is as long as the first of its own
        with_last = costs[:stop] + (stop - np.arange(stop)) * lengths[:stop]
        starts[stop] = with_last.argmin()
        costs[stop] = with_last.min() + pass_cost
    passes, stop = [], count
    while stop > 0:
        start = starts[stop]
        passes.append((int(stop - start), int(lengths[start])))
        stop = start
    return tuple(reversed(passes))
