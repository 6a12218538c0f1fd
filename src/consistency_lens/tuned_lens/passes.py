"""Passes of the subject that serve several steps: a step needs few positions, best of many texts; a pass gives many.

Blocks are read in pools. Every step of a pool takes other positions of each of its blocks, so the rows of a step come
from as many texts as a pass can hold, and no text goes through the subject twice in an epoch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .residual_batches import ResidualBatch
from .streamed_kl import Teacher


class PassDataset(Dataset):
    """Blocks of tokens as often as steps need them: pool by pool, step by step, block by block.

    Args:
        blocks: (N, S) integers, may be memory-mapped.
        pool: blocks that go through the subject together, of all processes.
        steps: that a pool serves.
        seed: of the order of the blocks.
        first: the number of the first block.
    """

    def __init__(self, blocks: np.ndarray, pool: int, steps: int, seed: int, first: int = 0) -> None:
        self.blocks, self.pool, self.steps, self.first = blocks, pool, steps, first
        self.order = np.random.default_rng(seed).permutation(len(blocks))

    def __len__(self) -> int:
        return len(self.blocks) * self.steps

    def __getitem__(self, item: int) -> dict[str, Any]:
        pool, rest = divmod(item, self.pool * self.steps)
        first = pool * self.pool
        step, place = divmod(rest, min(self.pool, len(self.blocks) - first))
        block = self.order[first + place]
        input_ids = self.blocks[block].astype(np.int64)
        return {"input_ids": input_ids, "row": self.first + int(block), "pool": pool, "part": step}


class PassCache:
    """What the subject gave for the blocks of the pool that is being worked on."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._blocks: dict[int, ResidualBatch] = {}

    def take(
        self,
        pool: tuple[int, int],
        rows: Sequence[int],
        parts: Sequence[int],
        steps: int,
        read: Callable[[list[int]], ResidualBatch],
    ) -> ResidualBatch:
        """The positions of some parts of some blocks, of which those that are not here yet are read.

        Args:
            pool: that they are of, with its epoch; what is of another is dropped.
            rows: the blocks' numbers.
            parts: of each block, which of its `steps` parts.
            read: reads the blocks at these places among `rows` with one pass.
        """
        if pool != self._pool:
            self._pool = pool
            self._blocks.clear()
        places = {row: place for place, row in reversed(list(enumerate(rows)))}  # a block may have several parts here
        missing = sorted(place for row, place in places.items() if row not in self._blocks)
        if missing:
            batch = read(missing)
            for place, block in zip(missing, split_blocks(batch, len(missing)), strict=True):
                self._blocks[rows[place]] = block
        chosen = [every_nth(self._blocks[row], part, steps) for row, part in zip(rows, parts, strict=True)]
        return concatenated(chosen)


def split_blocks(batch: ResidualBatch, count: int) -> list[ResidualBatch]:
    """A batch as one for each of its blocks, which have equally many rows."""
    hidden = batch.hidden.chunk(count, dim=1)
    teachers = zip(*(tensor.chunk(count) for tensor in batch.teacher), strict=True)
    return [ResidualBatch(rows, Teacher(*teacher)) for rows, teacher in zip(hidden, teachers, strict=True)]


def every_nth(block: ResidualBatch, first: int, steps: int) -> ResidualBatch:
    """Rows `first`, `first + steps`, ... of a block."""
    return ResidualBatch(block.hidden[:, first::steps], Teacher(*(tensor[first::steps] for tensor in block.teacher)))


def concatenated(batches: Sequence[ResidualBatch]) -> ResidualBatch:
    """The rows of several batches as one."""
    hidden = torch.cat([batch.hidden for batch in batches], dim=1)
    teachers = [batch.teacher for batch in batches]
    return ResidualBatch(hidden, Teacher(*(torch.cat(parts) for parts in zip(*teachers, strict=True))))
