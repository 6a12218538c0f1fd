"""One batch of text as both sides of the fit see it: normalised residuals of some layers, and the teacher.

Shapes: B blocks, S tokens, K positions a block, N = B K rows, d width, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..residual_stream import gather_positions
from .modeling_tuned_lens import TunedLens
from .streamed_kl import Head, Teacher, read_teacher

# from this vocabulary on the unembedding is multiplied in bfloat16 (plan, section 15)
LARGE_VOCABULARY = 100_000
# layers and positions of a step at a vocabulary of 32,000, and the fewest (plan, section 15)
USUAL_LAYERS, USUAL_POSITIONS, USUAL_VOCABULARY = 24, 16, 32_000
FEWEST_LAYERS, FEWEST_POSITIONS = 8, 12


class Budget(NamedTuple):
    """The work of a step for each block of text."""

    layers: int
    positions: int


def vocabulary_budget(vocab_size: int, num_layers: int) -> Budget:
    """What a step reads where nothing is said: less by sqrt(32000 / V) for larger vocabularies, but not below a floor.

    Args:
        num_layers: L; the last one is not among the layers.
    """
    share = min(1.0, math.sqrt(USUAL_VOCABULARY / vocab_size))
    layers = max(FEWEST_LAYERS, round(USUAL_LAYERS * share))
    return Budget(min(layers, num_layers - 1), max(FEWEST_POSITIONS, round(USUAL_POSITIONS * share)))


def make_head(lens: TunedLens, dtype: str = "auto") -> Head:
    """The subject's head for the fit.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 for a vocabulary of 100,000 and more.
    """
    readout = lens.readout
    half = dtype == "bfloat16" or (dtype == "auto" and readout.vocab_size >= LARGE_VOCABULARY)
    weight = readout.weight.to(torch.bfloat16) if half else readout.weight
    return Head(weight, readout.bias, readout.soft_cap)


def position_bounds(position_range: Sequence[float], seq_len: int) -> tuple[int, int]:
    """First position and the one after the last of a share of the context, such as 0.6 to 0.95.

    Raises:
        ValueError: if no position lies in it.
    """
    first, end = (math.floor(share * seq_len) for share in position_range)
    if not 0 <= first < end <= seq_len:
        raise ValueError(f"position_range: {list(position_range)} of {seq_len} tokens holds no position; try 0.6 0.95")
    return first, end


def sampled_positions(
    rows: Sequence[int], count: int | None, bounds: tuple[int, int], seed: int, epoch: int = 0
) -> Tensor:
    """Positions of each block, (B, K) int64 in random order, none twice; by seed, epoch and row alone.

    Args:
        rows: the blocks' numbers.
        count: K; None for all within the bounds.
        bounds: see `position_bounds`.
    """
    first, end = bounds
    count = end - first if count is None else min(count, end - first)
    drawn = [np.random.default_rng([seed, epoch, row]).permutation(end - first)[:count] for row in rows]
    return torch.from_numpy(np.stack(drawn) + first)


class ResidualBatch(NamedTuple):
    """What the fit reads of one batch of text."""

    hidden: Tensor
    """Normalised residuals of the layers, (layers, N, d) float32; raw ones for translators before the norm."""
    teacher: Teacher
    """The final distribution of the N rows."""


@torch.no_grad()
def read_batch(
    lens: TunedLens, head: Head, input_ids: Tensor, positions: Tensor, layers: Sequence[int]
) -> ResidualBatch:
    """Runs the subject once, up to its last block; the head is read at the positions alone.

    Args:
        input_ids: (B, S) int64, without padding.
        positions: (B, K) int64.
        layers: without the last one.
    """
    last = lens.num_layers - 1
    *outputs, final = lens.block_outputs(input_ids, [*layers, last])
    readout = lens.readout
    chosen = [gather_positions(output, positions).flatten(0, 1).to(readout.device) for output in outputs]
    if lens.config.translator_place == "before_norm":
        hidden = torch.stack(chosen).float()
    else:
        hidden = torch.stack([readout.normalise(output) for output in chosen])
    teacher = read_teacher(readout.normalise(gather_positions(final, positions).flatten(0, 1)), head)
    return ResidualBatch(hidden, teacher)
