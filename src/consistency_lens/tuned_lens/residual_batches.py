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

# from this vocabulary on the unembedding is multiplied in bfloat16 where that is fast: on a GPU and on a CPU with
# instructions for it; one without takes many times as long as in float32
LARGE_VOCABULARY = 100_000
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
# layers and positions of a step at a vocabulary of 32,000, and the fewest
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
        dtype: "float32", "bfloat16", or "auto": bfloat16 for a vocabulary of 100,000 and more, where it is fast.
    """
    readout = lens.readout
    automatic = readout.vocab_size >= LARGE_VOCABULARY and has_fast_bfloat16(readout.device)
    half = dtype == "bfloat16" or (dtype == "auto" and automatic)
    weight = readout.weight.to(torch.bfloat16) if half else readout.weight
    return Head(weight, readout.bias, readout.soft_cap)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrices are multiplied faster in bfloat16 than in float32 there."""
    if device.type != "cpu":
        return True
    # older versions of torch cannot tell
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


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


class Residuals(NamedTuple):
    """What the closed form reads of one batch of text, which needs no head."""

    hidden: Tensor
    """Normalised residuals of the layers, (layers, N, d) float32; raw ones for translators before the norm."""
    final: Tensor
    """Normalised residuals of the last layer, (N, d) float32."""

    def spread(self, count: int) -> "Residuals":
        """So many rows, or all, at even distances: rows side by side are of one text."""
        available = len(self.final)
        count = min(count, available)
        rows = torch.arange(count, device=self.final.device) * available // count
        return Residuals(self.hidden[:, rows], self.final[rows])


class ResidualBatch(NamedTuple):
    """What the KL reads of one batch of text."""

    hidden: Tensor
    """As those of `Residuals`."""
    teacher: Teacher
    """The final distribution of the N rows."""


@torch.no_grad()
def read_residuals(lens: TunedLens, input_ids: Tensor, positions: Tensor, layers: Sequence[int]) -> Residuals:
    """Runs the subject once, up to its last block.

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
    return Residuals(hidden, readout.normalise(gather_positions(final, positions).flatten(0, 1)))


def read_batch(
    lens: TunedLens, head: Head, input_ids: Tensor, positions: Tensor, layers: Sequence[int]
) -> ResidualBatch:
    """The same, and the final distribution; the head is read at the positions alone."""
    residuals = read_residuals(lens, input_ids, positions, layers)
    return ResidualBatch(residuals.hidden, read_teacher(residuals.final, head))
