"""How many bytes of tensors are alive while something runs, counted one by one: the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their making to their end.

    Attributes:
        peak: the most bytes that were alive at once; tensors of `known` do not count.
    """

    def __init__(self, known: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in (*known.parameters(), *known.buffers())}

    def forget(self, key: int, size: int) -> None:
        self.now -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output


def peak_bytes(work: Callable[[], Any], known: torch.nn.Module) -> int:
    """The most bytes of tensors, but for those of `known`, that were alive at once while `work` ran."""
    with LiveBytes(known) as live:
        work()
    return live.peak
