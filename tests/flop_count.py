"""How many FLOPs of matrix products something makes, 2 m n k each, as torch counts them."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Counts them in `count`. torch's `FlopCounterMode` also follows modules, which fails on some backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=output)
        return output


def flops(work: Callable[[], Any]) -> int:
    """What `work` makes."""
    with Flops() as counted:
        work()
    return counted.count
