"""Muon for matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

OPTIMIZERS = ("adamw", "muon")


class MuonWithAdamW(Optimizer):
    """Muon (Jordan 2024) for the parameters with two dimensions, AdamW for all others.

    Muon's step is scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), so one
    learning rate is right for both.

    Args:
        parameters: all that are trained.
        lr, betas, weight_decay: as AdamW takes them; Muon has momentum 0.95.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        parameters = list(parameters)
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        self.parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay),
        )
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own groups: a rate that is set here is set there."""
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; a closure is evaluated once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both states, the parameters numbered through."""
        state: dict[int, dict[str, Tensor]] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for part in self.parts:
            own = part.state_dict()
            state |= {first + index: values for index, values in own["state"].items()}
            groups += [{**group, "params": [first + i for i in group["params"]]} for group in own["param_groups"]]
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        first = 0
        groups = list(state_dict["param_groups"])
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            count = sum(len(group["params"]) for group in own)
            part.load_state_dict(
                {
                    "state": {i: state_dict["state"][first + i] for i in range(count) if first + i in state_dict["state"]},
                    "param_groups": [{**group, "params": [i - first for i in group["params"]]} for group in own],
                }
            )
            first += count
        self.param_groups = self._groups()


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """The optimizer of that name, one of OPTIMIZERS."""
    if name == "muon":
        return MuonWithAdamW(parameters, lr, betas, weight_decay)
    return AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
