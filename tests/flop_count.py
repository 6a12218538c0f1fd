"""How many FLOPs of matrix products something makes, 2 m n k each, as torch counts them: without the attention of a
CPU, unless it is asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and sums of all keys for each query, masked ones too."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])


def attention_backward(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products for each of those; that the scores are made anew is not counted."""
    return 2 * attention(query, key, value)


ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Flops(TorchDispatchMode):
    """Counts them in `count`. torch's `FlopCounterMode` also follows modules, which fails on some backward passes."""

    def __init__(self, with_attention: bool = False) -> None:
        super().__init__()
        self.formulas = {**flop_registry, **(ON_A_CPU if with_attention else {})}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=output)
        return output


def flops(work: Callable[[], Any], with_attention: bool = False) -> int:
    """What `work` makes."""
    with Flops(with_attention) as counted:
        work()
    return counted.count
