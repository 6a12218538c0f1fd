"""Counts what torch does."""

from collections import Counter

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
