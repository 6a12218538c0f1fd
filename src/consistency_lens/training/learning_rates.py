"""Learning rates by group, as functions of the optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


class GroupRates(LambdaLR):
    """A factor on each group's rate for every step, which can be worked out anew when the stages move.

    Args:
        optimizer: whose groups' rates are factors of those that they have now.
        factors: optimizer steps that were done -> factor for the next one; one function for each group.
    """

    def __init__(self, optimizer: Any, factors: Sequence[Callable[[int], float]]) -> None:
        super().__init__(optimizer, list(factors))

    def refresh(self) -> None:
        """Sets the rates of the step that comes next."""
        rates = [rate * factor(self.last_epoch) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates
