"""First and second moments of activations, taken block by block in float64."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """First and second moment of a set of activations."""

    mean: np.ndarray
    """(d,) float64."""
    rms: float
    """sqrt of the mean over rows and dimensions of (A - mean)^2."""


class BlockMoments(NamedTuple):
    """What a block of rows contributes to the moments of a set."""

    rows: int
    mean: np.ndarray
    """(d,) float64; zeros for an empty block."""
    squares: float
    """Sum over rows and dimensions of (A - mean)^2."""


def block_moments(block: np.ndarray) -> BlockMoments:
    """Moments of activations (n, d), in float64."""
    centred = block.astype(np.float64)
    mean = centred.mean(axis=0) if len(block) else np.zeros(block.shape[1])
    centred -= mean
    return BlockMoments(len(block), mean, float(np.einsum("nd,nd->", centred, centred)))


def merge_moments(blocks: Iterable[BlockMoments]) -> Moments:
    """Moments of all rows of several blocks (Chan et al. 1979); at least one block must have rows."""
    count, mean, squares = 0, np.zeros(()), 0.0
    for rows, block_mean, block_squares in blocks:
        if rows == 0:
            continue
        delta = block_mean - mean
        total = count + rows
        squares += block_squares + float((delta**2).sum()) * (count * rows / total)
        mean = mean + delta * (rows / total)
        count = total
    return Moments(mean, float(np.sqrt(squares / (count * mean.size))))


def streaming_moments(blocks: Iterable[np.ndarray]) -> Moments:
    """Mean and RMS of activations that come in blocks (n, d), in float64 and one pass."""
    return merge_moments(block_moments(block) for block in blocks)
