"""Counts what torch does."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operations by name in `counts`, and keeps the `shapes` of what is converted to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.shapes = Counter[str](), list[torch.Size]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._overloadpacket.__name__] += 1
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(result.shape)
        return result


class Gradients(TorchDispatchMode):
    """Counts the tensors of a shape that a backward pass makes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            known = {tensor.data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
            self.count += result.data_ptr() not in known and torch._C._current_autograd_node() is not None
        return result
