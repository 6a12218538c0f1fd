"""Depth percentiles of a model's layers."""

DEPTHS = (25, 50, 75)


def layer_at_depth(percent: float, num_layers: int) -> int:
    """The layer at a percentile of the depth, never the last one, which has nothing to learn (but of one layer)."""
    return min(round(percent / 100 * (num_layers - 1)), max(0, num_layers - 2))
