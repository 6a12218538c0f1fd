"""What a tuned lens gains over the norm lens on a suite of prompts: pure functions of what was read, with intervals.

The names are those of `kpis` in a lens's provenance. Layers that a milestone is reached at are 0-based; one that no
layer reaches counts as layer L. So a lens that never reaches it is later than one that reaches it at the last layer,
and where neither does, as where the model itself does not know the answer, nothing is shifted.
Shapes: L layers, S positions of a prompt, G temperatures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.metrics import percentile_interval
from .depth import DEPTHS, layer_at_depth

SEED = 316
RANKS = (10, 5, 1)
# Layers by which rank <= 10 and rank <= 5 are to be reached earlier (gate B)
EARLIER_BY = {10: 4, 5: 2}
# What the last layer's logits are divided by: 1 is one of them, and neighbours are 2.3 % apart, which costs a
# distribution of n nats^2 of variance at most n / 15,000 nats.
TEMPERATURES = np.exp2(np.arange(-30, 31) / 30)

DELTA = "median_delta_kl_bits@{25,50,75}%"
DELTA_CALIBRATED = "median_delta_kl_bits_vs_calibrated_norm@{25,50,75}%"
EARLINESS = "earliness_shift_first_rank_le_{10,5,1}"
EARLIER_SHARE = "share_of_prompts_with_shift_first_rank_le_{10,5}_at_least_{4,2}"
LAST_LAYER = "last_layer_kl_after_temp_bits"
COVERAGE = "rank1_coverage_gain"

Array = NDArray[Any]


@dataclass(frozen=True)
class PromptReading:
    """What the lenses read of one prompt, as far as it goes into the KPIs."""

    prompt_id: str
    norm_kl: Array
    """KL(P_final || P_layer) of the norm lens in bits, (L, S)."""
    calibrated_kl: Array | None
    """The same, each layer's logits divided by the norm lens's own fitted temperature; None where none was fitted."""
    tuned_kl: Array
    """The same of the tuned lens."""
    last_layer_kl: Array
    """KL(P_final || norm lens of the last layer) in bits at each of `TEMPERATURES`, (S, G)."""
    norm_rank: Array | None = None
    """Rank of the answer at the last position, 1 = top, (L,) int64; None for a prompt without an answer."""
    tuned_rank: Array | None = None


@dataclass(frozen=True)
class Estimate:
    """A figure of the suite, with its 95% interval by bootstrap over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class KPIs:
    """The KPIs of a suite. Tuples are in the order that their names in `as_dict` give."""

    prompts: int
    prompts_with_answer: int
    positions: int
    num_layers: int
    delta_kl_bits: tuple[Estimate, ...]
    """Median over positions of KL of the norm lens - KL of the tuned lens, in bits, at the layers of `DEPTHS`."""
    delta_kl_bits_vs_calibrated_norm: tuple[Estimate | None, ...]
    """The same against the norm lens with its own temperatures: what calibration alone does not give. None where
    none were fitted, as in the lenses that others have published."""
    earliness_shift: tuple[Estimate | None, ...]
    """Median over prompts of the layers by which the answer is earlier among the `RANKS` likeliest."""
    earlier_share: tuple[Estimate | None, ...]
    """Share of prompts with an answer where that is at least what `EARLIER_BY` says."""
    last_layer_kl_after_temp_bits: Estimate
    """Mean over positions of KL(P_final || norm lens of the last layer) at the best single temperature, in bits."""
    last_layer_temperature: float
    """That temperature."""
    rank1_coverage_gain: Estimate | None
    """Share of layers with the answer on top under the tuned lens, less that under the norm lens; mean over prompts
    with an answer."""

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, and beside them their intervals and what they were measured on."""
        figures: dict[str, Any] = {
            DELTA: self.delta_kl_bits,
            EARLINESS: self.earliness_shift,
            LAST_LAYER: self.last_layer_kl_after_temp_bits,
            COVERAGE: self.rank1_coverage_gain,
            DELTA_CALIBRATED: self.delta_kl_bits_vs_calibrated_norm,
            EARLIER_SHARE: self.earlier_share,
        }
        return {
            **{name: _each(of, lambda figure: figure.value) for name, of in figures.items()},
            "last_layer_temperature": self.last_layer_temperature,
            "layers@{25,50,75}%": [layer_at_depth(depth, self.num_layers) for depth in DEPTHS],
            "num_layers": self.num_layers,
            "prompts": self.prompts,
            "prompts_with_answer": self.prompts_with_answer,
            "positions": self.positions,
            "ci95": {name: _each(of, lambda figure: [figure.low, figure.high]) for name, of in figures.items()},
        }


def compute_kpis(readings: Sequence[PromptReading], num_resamples: int = 1000, seed: int = SEED) -> KPIs:
    """The KPIs of a suite.

    Args:
        readings: one a prompt.
        num_resamples: draws of as many prompts as there are, with replacement, that the intervals are taken from.
        seed: of the draws.

    Raises:
        ValueError: if there are no prompts.
    """
    if not readings:
        raise ValueError("kpis: got no prompts; the suite needs at least one")
    kl = [_kl_part(reading) for reading in readings]
    *deltas, last_layer = _estimates(_kl_statistics, kl, num_resamples, seed)
    answers = [of for of in map(_answer_part, readings) if of is not None]
    ranks: list[Estimate | None] = [None] * (len(RANKS) + len(EARLIER_BY) + 1)
    if answers:
        ranks[:] = _estimates(_answer_statistics, answers, num_resamples, seed)
    return KPIs(
        prompts=len(readings),
        prompts_with_answer=len(answers),
        positions=sum(reading.norm_kl.shape[1] for reading in readings),
        num_layers=len(readings[0].norm_kl),
        delta_kl_bits=tuple(deltas[: len(DEPTHS)]),
        delta_kl_bits_vs_calibrated_norm=tuple(deltas[len(DEPTHS) :]) or (None,) * len(DEPTHS),
        earliness_shift=tuple(ranks[: len(RANKS)]),
        earlier_share=tuple(ranks[len(RANKS) : -1]),
        last_layer_kl_after_temp_bits=last_layer,
        last_layer_temperature=best_temperature([reading.last_layer_kl for reading in readings])[0],
        rank1_coverage_gain=ranks[-1],
    )


def first_layer_within(rank: Array, most: int) -> int | None:
    """The first layer whose rank (L,) is at most `most`; None if none is."""
    reached = np.flatnonzero(np.asarray(rank) <= most)
    return int(reached[0]) if len(reached) else None


def earliness_shift(norm_rank: Array, tuned_rank: Array, most: int) -> int:
    """Layers by which the tuned lens reaches a rank before the norm lens; negative if later, L if never."""
    norm, tuned = (first_layer_within(rank, most) for rank in (norm_rank, tuned_rank))
    never = len(norm_rank)
    return (never if norm is None else norm) - (never if tuned is None else tuned)


def best_temperature(last_layer_kl: Sequence[Array]) -> tuple[float, float]:
    """The one of `TEMPERATURES` at which the last layer's mean KL over all positions is least, and that KL.

    Args:
        last_layer_kl: (S, G) of each prompt.
    """
    mean = np.concatenate(last_layer_kl).mean(axis=0)
    best = int(mean.argmin())
    return float(TEMPERATURES[best]), float(mean[best])


class _KLPart(NamedTuple):
    """One prompt's share in the statistics of KL."""

    deltas: Array
    """ΔKL at the depths against the norm lens, then against the calibrated one if there is one, (6 or 3, S)."""
    last_layer: Array
    """Sums over positions at each temperature, (G,)."""


def _kl_part(reading: PromptReading) -> _KLPart:
    layers = [layer_at_depth(depth, len(reading.norm_kl)) for depth in DEPTHS]
    tuned = reading.tuned_kl[layers]
    norms = (reading.norm_kl, reading.calibrated_kl)
    deltas = np.concatenate([norm[layers] - tuned for norm in norms if norm is not None])
    return _KLPart(deltas, reading.last_layer_kl.sum(axis=0))


def _kl_statistics(parts: Sequence[_KLPart]) -> Array:
    """The medians of ΔKL, and the last layer's mean KL at its best temperature."""
    deltas = np.concatenate([of.deltas for of in parts], axis=1)
    last_layer = np.sum([of.last_layer for of in parts], axis=0).min() / deltas.shape[1]
    return np.append(np.median(deltas, axis=1), last_layer)


def _answer_part(reading: PromptReading) -> Array | None:
    """One prompt's shifts at `RANKS`, whether they are as `EARLIER_BY` asks, and its coverage gain; (6,)."""
    norm, tuned = reading.norm_rank, reading.tuned_rank
    if norm is None or tuned is None:
        return None
    shifts = {most: earliness_shift(norm, tuned, most) for most in RANKS}
    enough = [shifts[most] >= layers for most, layers in EARLIER_BY.items()]
    return np.array([*shifts.values(), *enough, np.mean(tuned == 1) - np.mean(norm == 1)], dtype=float)


def _answer_statistics(parts: Sequence[Array]) -> Array:
    """Medians of the shifts, means of the rest."""
    rows = np.stack(parts)
    shifts = len(RANKS)
    return np.append(np.median(rows[:, :shifts], axis=0), rows[:, shifts:].mean(axis=0))


def _estimates(
    statistics: Callable[[Sequence[Any]], Array], parts: Sequence[Any], num_resamples: int, seed: int
) -> list[Estimate]:
    """Each statistic of the prompts with its interval by bootstrap over them."""
    draws = np.random.default_rng(seed).integers(len(parts), size=(num_resamples, len(parts)))
    resampled = torch.from_numpy(np.stack([statistics([parts[index] for index in draw]) for draw in draws], axis=1))
    values = statistics(parts).tolist()
    return [Estimate(value, *percentile_interval(row)) for value, row in zip(values, resampled, strict=True)]


def _each(figures: Any, shown: Callable[[Estimate], Any]) -> Any:
    if isinstance(figures, tuple):
        return [None if figure is None else shown(figure) for figure in figures]
    return None if figures is None else shown(figures)
