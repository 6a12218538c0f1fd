"""The basis that translators work in: centred, scaled to unit variance, rotated to the principal axes.

A translator in that basis is gentle where residuals hardly vary, so few directions of large variance do not rule its
gradient (Nguyen 2024, "Logit Prisms", for the shared basis; Bell and Sejnowski 1997 for whitening).
"""

import torch
from torch import Tensor, nn

# of the mean variance: dimensions that vary less are scaled as if they varied so much
VARIANCE_FLOOR = 1e-6


class Preconditioner(nn.Module):
    """z = ((h - mean) / scale) R, for normalised residuals h (..., d), and back; the identity until it is fitted.

    Args:
        width: d.
        rotated: whether R is there ("prism"), or only the scaling ("whitening").
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor | None

    def __init__(self, width: int, rotated: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width) if rotated else None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Into the basis, (..., d), where `hidden` is; the basis comes there if it lies elsewhere."""
        device = hidden.device
        hidden = (hidden - self.mean.to(device)) / self.scale.to(device)
        return hidden if self.rotation is None else hidden @ self.rotation.to(device)

    def inverse(self, hidden: Tensor) -> Tensor:
        """Back from it, (..., d)."""
        device = hidden.device
        hidden = hidden if self.rotation is None else hidden @ self.rotation.to(device).T
        return hidden * self.scale.to(device) + self.mean.to(device)

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Takes the statistics of normalised residuals, pooled over layers.

        The rotation's columns are the eigenvectors of the scaled covariance, largest variance first, each with its
        largest entry positive, so that one fit equals the next.

        Args:
            mean: (d,).
            covariance: (d, d).
        """
        variance = covariance.diagonal().clamp(min=VARIANCE_FLOOR * float(covariance.diagonal().mean()))
        scale = variance.sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        if self.rotation is not None:
            vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale)).eigenvectors.flip(1)
            largest = vectors.abs().argmax(dim=0, keepdim=True)
            self.rotation.copy_(vectors * vectors.gather(0, largest).sign())

    def matrix(self) -> Tensor:
        """P (d, d), float64, with z = (h - mean) P."""
        scaling = torch.diag(1 / self.scale.double())
        return scaling if self.rotation is None else scaling @ self.rotation.double()
