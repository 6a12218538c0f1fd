"""One layer's translator: an affine map of the normalised residual, and a temperature."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

# added to the softplus, so that no temperature reaches 0
MIN_TEMPERATURE = 1e-3
# standard deviation of V at the start: small beside U's, and not 0
SMALL = 1e-3


class TunedTranslator(nn.Module):
    """h + (h U) V^T + c, or h + h W + c at full rank, for the residuals h (..., d) of one layer.

    It starts close to the identity, but never *at* U = V = 0, where the gradient of both is zero for ever.

    Args:
        width: d.
        rank: k; None for full.
        temperature: whether there is one to learn; else it is 1.
    """

    U: nn.Parameter | None
    V: nn.Parameter | None
    W: nn.Parameter | None
    log_tau: nn.Parameter | None

    def __init__(self, width: int, rank: int | None, temperature: bool) -> None:
        super().__init__()
        if rank is None:
            self.W = nn.Parameter(torch.zeros(width, width))
            self.U = self.V = None
        else:
            self.U = nn.Parameter(torch.randn(width, rank) * width**-0.5)
            self.V = nn.Parameter(torch.randn(width, rank) * SMALL)
            self.W = None
        self.c = nn.Parameter(torch.zeros(width))
        self.log_tau = nn.Parameter(_raw_temperature(torch.ones(()))) if temperature else None

    def forward(self, hidden: Tensor) -> Tensor:
        """The translated residuals (..., d), where `hidden` is; the translator comes there if it lies elsewhere."""
        device = hidden.device
        if self.W is not None:
            return hidden + hidden @ self.W.to(device) + self.c.to(device)
        assert self.U is not None and self.V is not None
        return hidden + (hidden @ self.U.to(device)) @ self.V.to(device).T + self.c.to(device)

    def smallness(self) -> Tensor:
        """The sum of squares of U, V (or W) and c, ()."""
        matrices = [matrix for matrix in (self.U, self.V, self.W) if matrix is not None]
        return sum((tensor.square().sum() for tensor in matrices), start=self.c.square().sum())

    def distance(self, other: "TunedTranslator") -> Tensor:
        """The squared Frobenius norm of the difference of two maps, (); `other` is a constant.

        Of maps and not of U and V, as those say the same map in many ways: |U V^T - A B^T|^2 is summed up from k x k
        products.
        """
        if self.W is not None:
            assert other.W is not None
            return (self.W - other.W.detach()).square().sum()
        assert self.U is not None and self.V is not None and other.U is not None and other.V is not None
        U, V = torch.cat([self.U, other.U.detach()], dim=1), torch.cat([self.V, -other.V.detach()], dim=1)
        return ((U.T @ U) * (V.T @ V)).sum()

    @property
    def tau(self) -> Tensor:
        """The temperature, (), above 0."""
        if self.log_tau is None:
            return torch.ones((), device=self.c.device)
        return softplus(self.log_tau) + MIN_TEMPERATURE

    @torch.no_grad()
    def set_temperature(self, value: Tensor) -> None:
        """Sets the temperature to a value, ()."""
        if self.log_tau is not None:
            self.log_tau.copy_(_raw_temperature(value))


def _raw_temperature(value: Tensor) -> Tensor:
    """The parameter whose temperature is `value`: the inverse of softplus."""
    return torch.log(torch.expm1((value - MIN_TEMPERATURE).clamp(min=1e-6)))
