"""Prompts as two lenses would read them, with differences that are known."""

import numpy as np

from consistency_lens.tuned_lens.kpis import TEMPERATURES, PromptReading, compute_kpis

LAYERS = 9
AT_DEPTHS = [1, 4, 6]
ONE = int(np.argmin(np.abs(TEMPERATURES - 1)))


def reading(
    name="a", positions=3, delta=(0.0, 0.0, 0.0), calibrated=0.0, norm_rank=None, tuned_rank=None, last=0.0, best=ONE
):
    """A prompt whose lenses differ by `delta` bits at the three depths, and nowhere else."""
    tuned_kl = np.ones((LAYERS, positions))
    norm_kl = tuned_kl.copy()
    norm_kl[AT_DEPTHS] += np.array(delta)[:, None]
    last_layer_kl = np.full((positions, len(TEMPERATURES)), last + 1.0)
    last_layer_kl[:, best] = last
    ranks = [None if rank is None else np.array(rank) for rank in (norm_rank, tuned_rank)]
    calibrated_kl = None if calibrated is None else norm_kl - calibrated
    return PromptReading(name, norm_kl, calibrated_kl, tuned_kl, last_layer_kl, *ranks)


def kpis(*readings, **arguments):
    """Their KPIs, with few resamples."""
    return compute_kpis(readings, **{"num_resamples": 40, **arguments})
