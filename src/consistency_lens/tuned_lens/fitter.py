"""The closed-form start of a tuned lens: ridge regression in one pass, cut to rank, and temperatures.

It takes much of the way from the norm lens to the tuned lens in seconds; the KL steps of `TunedLensTrainer` go on from
there.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic_write import write_tensors
from .modeling_tuned_lens import TunedLens
from .moments import AffineMap, RidgeMoments, cut_to_rank, pooled
from .passes import concatenated
from .residual_batches import ResidualBatch
from .streamed_kl import CHUNK_NUMBERS, Head, Teacher, mean_probabilities, streamed_kl

# Rows that temperatures are fitted on, and what they lie between.
CALIBRATION_ROWS = 512
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
BISECTIONS = 14


class TunedLensFitter:
    """Sums up moments batch by batch, then solves for every translator of a lens, its basis and its temperatures.

    Args:
        lens: whose tensors `solve` sets; translators after the norm.
        head: of its subject.
        ridge: the penalty, as a share of the mean variance of a layer's residuals.

    Attributes:
        rows: that were summed.

    Raises:
        ValueError: for translators before the norm, or a ridge below 0.
    """

    def __init__(self, lens: TunedLens, head: Head, ridge: float = 1e-2) -> None:
        if lens.config.translator_place != "after_norm":
            raise ValueError("ridge: translators before the norm have no closed form; fit them by KL steps alone")
        if ridge < 0:
            raise ValueError(f"ridge must be 0 or more, got {ridge}; 0.01 is a good start")
        self.lens, self.head, self.ridge = lens, head, ridge
        width, device = lens.config.width, lens.readout.device
        self._moments = {layer: RidgeMoments(width, device) for layer in range(lens.num_layers - 1)}
        self._mean_probability = torch.zeros(lens.config.vocab_size, dtype=torch.float64, device=device)
        self._expected_squares = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._kept: list[ResidualBatch] = []

    @property
    def rows(self) -> int:
        return self._moments[0].count

    def update(self, batch: ResidualBatch) -> None:
        """Adds the rows of a batch that has every layer but the last."""
        teacher = batch.teacher
        for layer, moments in self._moments.items():
            moments.update(batch.hidden[layer], teacher.hidden)
        if self.lens.config.rank is not None:
            self._mean_probability += mean_probabilities(teacher, self.head) * len(teacher.hidden)
            self._expected_squares += teacher.expected_weight.T @ teacher.expected_weight
        missing = CALIBRATION_ROWS - sum(kept.hidden.shape[1] for kept in self._kept)
        if missing > 0:
            self._kept.append(spread_rows(batch, missing))

    @torch.no_grad()
    def solve(self) -> None:
        """Sets the lens: basis, translators, their temperatures, and the norm lens's own.

        Raises:
            ValueError: if there are fewer rows than the width, which leave the regression undetermined.
        """
        check_rows(self.rows, self.lens.config.width)
        if self.lens.preconditioner is not None:
            self.lens.preconditioner.fit(*pooled(self._moments))
        metric = None if self.lens.config.rank is None else self.metric()
        for layer, moments in self._moments.items():
            self._set(layer, moments, metric)
        self._calibrate()

    def metric(self) -> Tensor:
        """Of normalised final residuals, (d, d): to second order, a step s there costs s M s^T / 2 nats.

        It is the Fisher information W^T (diag(p) - p p^T) W of the final distribution, averaged over the rows. The
        slope of a soft-cap is left out.
        """
        metric = -self._expected_squares / self.rows
        size = max(1, CHUNK_NUMBERS // self.lens.config.width)
        probabilities = (self._mean_probability / self.rows).split(size)
        for part, probability in zip(self.head.weight.split(size), probabilities, strict=True):
            weight = part.double()
            metric += (weight.T * probability) @ weight
        return metric

    def _set(self, layer: int, moments: RidgeMoments, metric: Tensor | None) -> None:
        """Writes the solution of one layer into its translator, in the basis of the lens."""
        translator: Any = self.lens.translators[layer]
        basis = self.lens.preconditioner
        full = moments.solve(self.ridge)
        matrix = torch.eye(len(full.W)).to(full.W) if basis is None else basis.matrix().to(full.W)
        rank = self.lens.config.rank
        if rank is None:
            translator.W.copy_(torch.linalg.solve(matrix, full.W) @ matrix)
        else:
            U, V = cut_to_rank(full.W, rank, moments.covariance, metric)
            translator.U.copy_(torch.linalg.solve(matrix, U))
            translator.V.copy_(matrix.T @ V)
            full = AffineMap(U @ V.T, moments.mean_y - moments.mean_x - moments.mean_x @ (U @ V.T))
        centre = torch.zeros_like(full.c) if basis is None else basis.mean.to(full.c)
        translator.c.copy_((centre @ full.W + full.c) @ matrix)

    def _calibrate(self) -> None:
        """Sets the temperatures of both lenses to what is best on the rows that were kept."""
        lens = self.lens
        kept = concatenated(self._kept)
        translated = torch.stack([lens.translate(layer, hidden) for layer, hidden in enumerate(kept.hidden)])
        translators: Any = lens.translators
        for translator, value in zip(translators, best_temperatures(translated, kept.teacher, self.head), strict=True):
            translator.set_temperature(value)
        lens.norm_temperature[:-1] = best_temperatures(kept.hidden, kept.teacher, self.head)

    def save(self, path: Path) -> None:
        """Writes all that was summed, as safetensors."""
        kept = concatenated(self._kept)
        tensors = {f"{layer}.{name}": t for layer, m in self._moments.items() for name, t in m.state().items()}
        tensors |= {"mean_probability": self._mean_probability, "expected_squares": self._expected_squares}
        tensors |= {"kept": kept.hidden, **{f"teacher.{n}": t for n, t in kept.teacher._asdict().items()}}
        write_tensors(path, tensors)

    def load(self, path: Path) -> None:
        """Takes what `save` wrote."""
        tensors = {name: tensor.to(self.lens.readout.device) for name, tensor in load_file(path).items()}
        for layer, moments in self._moments.items():
            moments.load_state({name: tensors[f"{layer}.{name}"] for name in moments.state()})
        self._mean_probability = tensors["mean_probability"]
        self._expected_squares = tensors["expected_squares"]
        teacher = Teacher(*(tensors[f"teacher.{name}"] for name in Teacher._fields))
        self._kept = [ResidualBatch(tensors["kept"], teacher)]


def check_rows(rows: int, width: int) -> None:
    """Raises a ValueError for fewer rows than dimensions, which leave the regression undetermined."""
    if rows < width:
        raise ValueError(
            f"ridge: {rows} positions are too little text for {width} dimensions; raise tokens or ridge_tokens, or "
            "set ridge_tokens to 0 to start from the norm lens"
        )


def best_temperatures(hidden: Tensor, teacher: Teacher, head: Head) -> Tensor:
    """The temperature of each layer with the least mean KL, (layers,) float32.

    The KL is convex in 1 / temperature, so its slope has one root, which is found by bisection on a logarithmic scale.

    Args:
        hidden: (layers, N, d), what the head decodes.
        teacher: of the N rows.
    """
    low = hidden.new_full((len(hidden),), LOWEST_TEMPERATURE).log()
    high = hidden.new_full((len(hidden),), HIGHEST_TEMPERATURE).log()
    for _ in range(BISECTIONS):
        middle = ((low + high) / 2).exp().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(streamed_kl(hidden, middle, teacher, head).sum(), middle)
        middle = middle.detach().log()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return ((low + high) / 2).exp()


def spread_rows(batch: ResidualBatch, count: int) -> ResidualBatch:
    """So many rows of a batch, or all, at even distances: rows side by side are of one text."""
    available = batch.hidden.shape[1]
    count = min(count, available)
    rows = torch.arange(count, device=batch.hidden.device) * available // count
    return ResidualBatch(batch.hidden[:, rows], Teacher(*(tensor[rows] for tensor in batch.teacher)))
