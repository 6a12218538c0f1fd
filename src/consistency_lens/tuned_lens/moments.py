"""Ridge regression of the final residual on each layer's, from second moments summed in one pass; cut to a rank.

With x the normalised residual of a layer and y the final one, the full translator is `y ~ x + x W + c`. W minimises
E|x + x W + c - y|^2 + lambda |W|^2, so the penalty draws towards the identity, which is the norm lens. The best map of
low rank under the covariance S of x and a metric M of y comes from the singular vectors of S^(1/2) W M^(1/2) (Eckart
and Young 1936).
Shapes: N rows, d width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# of the largest eigenvalue: what smaller ones are raised to, so that the roots of covariance and metric have inverses
ROOT_FLOOR = 1e-4


class AffineMap(NamedTuple):
    """x + x W + c."""

    W: Tensor
    """(d, d) float64."""
    c: Tensor
    """(d,) float64."""


class RidgeMoments:
    """First and second moments of one layer's normalised residuals and the final ones.

    Sums are float64, of products in float32: one pass, d^2 numbers twice, however many rows. They are of the distances
    from the means of the first rows: where a mean is far larger than what varies around it, as norms with large biases
    make it, products in float32 of the residuals themselves would lose the covariance.

    Args:
        width: d.
        device: where they are summed.
    """

    NAMES = ("origin_x", "origin_y", "sum_x", "sum_y", "xx", "xy")

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.origin_x = torch.zeros(width, device=device)
        self.origin_y = torch.zeros(width, device=device)
        self.sum_x = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum_y = torch.zeros(width, dtype=torch.float64, device=device)
        self.xx = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.xy = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds rows: x (N, d) of the layer, y (N, d) of the last one, float32."""
        if self.count == 0:
            self.origin_x, self.origin_y = x.mean(dim=0), y.mean(dim=0)
        self.count += len(x)
        x, y = x - self.origin_x, y - self.origin_y
        self.sum_x += x.sum(dim=0)
        self.sum_y += y.sum(dim=0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    @property
    def mean_x(self) -> Tensor:
        """(d,)."""
        return self.origin_x + self.sum_x / self.count

    @property
    def mean_y(self) -> Tensor:
        """(d,)."""
        return self.origin_y + self.sum_y / self.count

    @property
    def covariance(self) -> Tensor:
        """Of x, (d, d)."""
        return self.xx / self.count - torch.outer(self.sum_x, self.sum_x) / self.count**2

    @property
    def cross_covariance(self) -> Tensor:
        """Of x with y, (d, d)."""
        return self.xy / self.count - torch.outer(self.sum_x, self.sum_y) / self.count**2

    def solve(self, ridge: float) -> AffineMap:
        """The full translator.

        Args:
            ridge: lambda, as a share of the mean variance of x.
        """
        covariance = self.covariance
        penalty = ridge * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        W = torch.linalg.solve(covariance + penalty, self.cross_covariance - covariance)
        return AffineMap(W, self.mean_y - self.mean_x - self.mean_x @ W)

    def state(self) -> dict[str, Tensor]:
        """All that is summed, for a checkpoint."""
        return {name: getattr(self, name) for name in self.NAMES} | {"count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        self.count = int(state["count"])
        for name in self.NAMES:
            getattr(self, name).copy_(state[name])


def check_ridge(ridge: float) -> None:
    """Raises a ValueError for no penalty, with which the regression may have no solution.

    Normalised residuals need not span all dimensions: those of a LayerNorm sum to 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}; 0.01 is a good start")


def cut_to_rank(W: Tensor, rank: int, covariance: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U (d, k) and V (d, k) with U V^T as close to W as rank k allows, where it counts.

    What is minimised is E|x (W - U V^T)|^2, in the metric of the output. Columns of U and V come in equal lengths.

    Args:
        W: (d, d).
        rank: k.
        covariance: of x, (d, d).
        metric: of the output, (d, d), positive semi-definite; None counts all directions alike.
    """
    root = _root(covariance)
    outer = torch.eye(len(W)).to(W) if metric is None else _root(metric)
    left, values, right = torch.linalg.svd(root @ W @ outer)
    U = torch.linalg.solve(root, left[:, :rank]) * values[:rank].sqrt()
    V = torch.linalg.solve(outer, right[:rank].T) * values[:rank].sqrt()
    balance = (V.norm(dim=0) / U.norm(dim=0).clamp(min=1e-30)).sqrt()
    return U * balance, V / balance.clamp(min=1e-30)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root, raised where the matrix is nearly singular."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=ROOT_FLOOR * float(values.max()))
    return (vectors * values.sqrt()) @ vectors.T


def pooled(moments: Mapping[Any, RidgeMoments]) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of x over the rows of all layers."""
    layers = list(moments.values())
    count = sum(layer.count for layer in layers)
    mean = torch.stack([layer.mean_x * layer.count for layer in layers]).sum(dim=0) / count
    covariance = torch.zeros_like(layers[0].xx)
    for layer in layers:
        apart = layer.mean_x - mean
        covariance += (layer.covariance + torch.outer(apart, apart)) * (layer.count / count)
    return mean, covariance
