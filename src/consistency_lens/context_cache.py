"""The key-value cache of a context for a pass that starts anew at some block.

When the output of block k is overwritten at every token of a pass, what the blocks up to k make of these tokens does
not matter, and neither does the context that they see. So only the blocks above k keep keys and values.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Keys and values (B, heads, S, width of a head) of each block; None for a block that keeps none.
ContextCache = tuple[tuple[Tensor, Tensor] | None, ...]


class _NotKept(DynamicLayer):
    """Hands on the keys and values of a pass without a past, and keeps nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class ContextComplete(Exception):
    """Ends a pass over a context once its last block has handed in keys and values, which are all that it is for."""


class _LastKept(DynamicLayer):
    """Keeps keys and values, and ends the pass."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        raise ContextComplete


class _NotRead(DynamicLayer):
    """Stands for `length` tokens whose keys and values do not matter: those of the pass, repeated without a copy."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        total = self.length + key_states.shape[-2]
        return tuple(states[:, :, :1].expand(-1, -1, total, -1) for states in (key_states, value_states))  # type: ignore


def empty_cache(num_blocks: int, first: int, stop: bool = False) -> DynamicCache:
    """A cache for a pass over a context, in which the blocks from `first` on keep what a later pass reads.

    With `stop` the pass ends in the last block, by `ContextComplete`.
    """
    # Built without a config, it keeps sliding-window layers at full length, which one shared mask needs.
    cache = DynamicCache()
    cache.layers.extend(_NotKept() if block < first else DynamicLayer() for block in range(num_blocks))
    if stop:
        cache.layers[-1] = _LastKept()
    return cache


def joined(caches: Sequence[DynamicCache], length: int) -> ContextCache:
    """What caches of `empty_cache` hold after their passes, one behind the other, as of `length` tokens each.

    Of a pass over fewer tokens, zeros fill up the rest. The caches are empty then: both are never there whole.
    """
    if len(caches) == 1:
        return tuple(states_of(layer) for layer in caches[0].layers)
    blocks = []
    while caches[0].layers:
        blocks.append(padded([states_of(cache.layers.pop(0)) for cache in caches], length))
    return tuple(blocks)


def states_of(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values that a layer of a cache holds."""
    return (layer.keys, layer.values) if layer.is_initialized else None


def padded(parts: Sequence[tuple[Tensor, Tensor] | None], length: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values (B, heads, S, width) of several passes as those of one over `length` tokens."""
    kept = [states for states in parts if states is not None]
    if not kept:
        return None
    keys, values = (
        torch.cat([F.pad(part, (0, 0, 0, length - part.shape[2])) for part in states])
        for states in zip(*kept, strict=True)
    )
    return keys, values


def reopened(context: ContextCache, length: int) -> DynamicCache:
    """A cache over the kept keys and values of `length` tokens; what is appended leaves them as they are."""
    cache = DynamicCache()
    for states in context:
        if states is None:
            cache.layers.append(_NotRead(length))
            continue
        layer = DynamicLayer()
        # Set directly, as `update` would copy the whole context once more.
        layer.lazy_initialization(*states)
        layer.keys, layer.values = states
        cache.layers.append(layer)
    return cache
