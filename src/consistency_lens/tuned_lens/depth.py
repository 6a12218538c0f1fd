"""Depth percentiles of a model's layers."""

import math

DEPTHS = (25, 50, 75)


def layer_at_depth(percent: float, num_layers: int) -> int:
    """The layer after which `percent` of the blocks have run (of 32 blocks the 8th, 16th, 24th).

    Never the last layer, which has nothing to learn (but of one layer).
    """
    return min(max(0, math.floor(percent / 100 * num_layers + 0.5) - 1), max(0, num_layers - 2))
