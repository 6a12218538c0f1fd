"""The closed-form start of a tuned lens: ridge regression in one pass, cut to rank, and temperatures.

It takes much of the way from the norm lens to the tuned lens in seconds; the KL steps of `TunedLensTrainer` go on from
there.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic_write import write_tensors
from .modeling_tuned_lens import TunedLens
from .moments import AffineMap, RidgeMoments, check_ridge, cut_to_rank, pooled
from .passes import concatenated
from .residual_batches import ResidualBatch, Residuals
from .streamed_kl import CHUNK_NUMBERS, Head, Teacher, mean_probabilities, read_teacher

# Rows that temperatures are fitted on, and what they lie between.
CALIBRATION_ROWS = 512
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
TEMPERATURE_STEPS, TEMPERATURE_TOLERANCE = 20, 1e-4
# rows that the metric is read from, for the head costs far more than the moments: so many, and every so manieth after
METRIC_ROWS, METRIC_STRIDE = 2048, 8


class TunedLensFitter:
    """Sums up moments batch by batch, then solves for every translator of a lens, its basis and its temperatures.

    Args:
        lens: whose tensors `solve` sets; translators after the norm.
        head: of its subject.
        ridge: the penalty, as a share of the mean variance of a layer's residuals.

    Attributes:
        rows: that were summed.

    Raises:
        ValueError: for translators before the norm, or a ridge that is not above 0.
    """

    def __init__(self, lens: TunedLens, head: Head, ridge: float = 1e-2) -> None:
        if lens.config.translator_place != "after_norm":
            raise ValueError("ridge: translators before the norm have no closed form; fit them by KL steps alone")
        check_ridge(ridge)
        self.lens, self.head, self.ridge = lens, head, ridge
        width, device = lens.config.width, lens.readout.device
        self._moments = {layer: RidgeMoments(width, device) for layer in range(lens.num_layers - 1)}
        self._mean_probability = torch.zeros(lens.config.vocab_size, dtype=torch.float64, device=device)
        self._expected_squares = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._metric_rows = 0
        self._kept: list[ResidualBatch] = []

    @property
    def rows(self) -> int:
        return self._moments[0].count

    def update(self, residuals: Residuals) -> None:
        """Adds the rows of a batch that has every layer but the last."""
        if self.lens.config.rank is not None:
            numbers = torch.arange(self.rows, self.rows + len(residuals.final), device=residuals.final.device)
            self._add_to_metric(residuals.final[(numbers < METRIC_ROWS) | (numbers % METRIC_STRIDE == 0)])
        for layer, moments in self._moments.items():
            moments.update(residuals.hidden[layer], residuals.final)
        missing = CALIBRATION_ROWS - sum(kept.hidden.shape[1] for kept in self._kept)
        if missing > 0:
            kept = residuals.spread(missing)
            self._kept.append(ResidualBatch(kept.hidden, read_teacher(kept.final, self.head)))

    def _add_to_metric(self, final: Tensor) -> None:
        """Adds final residuals, (N, d)."""
        teacher = read_teacher(final, self.head)
        self._metric_rows += len(final)
        self._mean_probability += mean_probabilities(teacher, self.head) * len(final)
        self._expected_squares += teacher.expected_weight.T @ teacher.expected_weight

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
        self.calibrate_translators()
        self.calibrate_norm_lens()

    def metric(self) -> Tensor:
        """Of normalised final residuals, (d, d): to second order, a step s there costs s M s^T / 2 nats.

        It is the Fisher information W^T (diag(p) - p p^T) W of the final distribution, averaged over some
        of the rows. The slope of a soft-cap is left out.
        """
        metric = -self._expected_squares / self._metric_rows
        size = max(1, CHUNK_NUMBERS // self.lens.config.width)
        probabilities = (self._mean_probability / self._metric_rows).split(size)
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

    @torch.no_grad()
    def calibrate_translators(self) -> None:
        """Sets the temperatures of the translators to what is best on the rows that were kept."""
        lens, kept = self.lens, concatenated(self._kept)
        translated = torch.stack([lens.translate(layer, hidden) for layer, hidden in enumerate(kept.hidden)])
        translators: Any = lens.translators
        for translator, value in zip(translators, best_temperatures(translated, kept.teacher, self.head), strict=True):
            translator.set_temperature(value)

    @torch.no_grad()
    def calibrate_norm_lens(self) -> None:
        """Sets the norm lens's own temperatures likewise."""
        kept = concatenated(self._kept)
        self.lens.norm_temperature[:-1] = best_temperatures(kept.hidden, kept.teacher, self.head)

    def save(self, path: Path) -> None:
        """Writes all that was summed, as safetensors."""
        kept = concatenated(self._kept)
        tensors = {f"{layer}.{name}": t for layer, m in self._moments.items() for name, t in m.state().items()}
        tensors |= {"mean_probability": self._mean_probability, "expected_squares": self._expected_squares}
        tensors |= {"metric_rows": torch.tensor(self._metric_rows), "kept": kept.hidden}
        tensors |= {f"teacher.{n}": t for n, t in kept.teacher._asdict().items()}
        write_tensors(path, tensors)

    def load(self, path: Path) -> None:
        """Takes what `save` wrote."""
        tensors = {name: tensor.to(self.lens.readout.device) for name, tensor in load_file(path).items()}
        for layer, moments in self._moments.items():
            moments.load_state({name: tensors[f"{layer}.{name}"] for name in moments.state()})
        self._mean_probability = tensors["mean_probability"]
        self._expected_squares = tensors["expected_squares"]
        self._metric_rows = int(tensors["metric_rows"])
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

    The KL is convex in b = 1 / temperature; its slope is E_q[z] - E_p[z] with q = softmax(b z), its curvature the
    variance of z under q. Newton's steps find the root of the slope, within bounds that close in on it. The logits of
    one layer are held at a time.

    Args:
        hidden: (layers, N, d), what the head decodes.
        teacher: of the N rows.
    """
    p = (head.logits(teacher.hidden) - teacher.lse[:, None]).exp()
    return torch.stack([_best_temperature(head.logits(rows), p) for rows in hidden])


def _best_temperature(logits: Tensor, p: Tensor) -> Tensor:
    """The temperature, (), for logits (N, V) and the distributions (N, V) that they are to match."""
    wanted = float((p * logits).sum(dim=-1).mean())
    low, high, b = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE, 1.0
    for _ in range(TEMPERATURE_STEPS):
        q = (logits * b).softmax(dim=-1)
        weighted = q.mul_(logits)
        means = weighted.sum(dim=-1)
        slope = float(means.mean()) - wanted
        curvature = float((weighted.mul_(logits).sum(dim=-1) - means.square()).mean())
        # where q is too sure of its largest logits, b is too large
        low, high = (low, b) if slope > 0 else (b, high)
        before, b = b, b - slope / curvature if curvature > 0 else 0.0
        if not low < b < high:
            b = math.sqrt(low * high)
        if abs(math.log(b / before)) < TEMPERATURE_TOLERANCE:
            break
    return logits.new_tensor(1 / b)
