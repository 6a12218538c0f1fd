"""The key-value cache of tokens of which keys and values are all that is wanted.

When the output of block k is overwritten at every token of a pass, what the blocks up to k make of these tokens does
not matter, and neither does the context that they see. So only the blocks above k keep keys and values. And of tokens
whose own output nobody reads, the last block gives keys and values alone: a pass over them ends there.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Of each pass over some of the sequences, and of each block: keys and values (n, heads, S, width of a head), or None
# for a block that keeps none.
ContextCache = tuple[tuple[tuple[Tensor, Tensor] | None, ...], ...]


class _NotKept(DynamicLayer):
    """Hands on the keys and values of a pass, and keeps nothing; `length` tokens are said to stand before it."""

    def __init__(self, length: int = 0) -> None:
        super().__init__()
        self.length = length

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class ContextComplete(Exception):
    """Ends a pass over a context once its last block has handed in keys and values, which are all that it is for."""


class _Kept(DynamicLayer):
    """Keeps the keys and values of one pass, each in one piece; with `stop` it ends the pass."""

    keys: Tensor
    values: Tensor

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop = stop

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        self.is_initialized = True
        if self.stop:
            raise ContextComplete
        return self.keys, self.values


class _EndsOnce(DynamicLayer):
    """Appends keys and values as any layer does; the first pass ends with that."""

    ends = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, *args, **kwargs)
        if self.ends:
            self.ends = False
            raise ContextComplete
        return states


class _NotRead(_NotKept):
    """Keys and values of the tokens before do not matter: they are those of the pass, repeated without a copy."""

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
    for block in range(num_blocks):
        cache.layers.append(_NotKept() if block < first else _Kept(stop and block == num_blocks - 1))
    return cache


def kept(caches: Sequence[DynamicCache]) -> ContextCache:
    """What caches of `empty_cache` hold after their passes."""
    return tuple(
        tuple((layer.keys, layer.values) if isinstance(layer, _Kept) else None for layer in cache.layers)
        for cache in caches
    )


def joined(context: ContextCache, length: int) -> ContextCache:
    """Several passes as one over `length` tokens; zeros fill up shorter ones."""
    if len(context) == 1:
        return context
    return (tuple(_padded(states, length) for states in zip(*context, strict=True)),)


def _padded(parts: Sequence[tuple[Tensor, Tensor] | None], length: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values of one block in several passes, one behind the other."""
    of_passes = [states for states in parts if states is not None]
    if not of_passes:
        return None
    keys, values = (
        torch.cat([F.pad(part, (0, 0, 0, length - part.shape[2])) for part in states])
        for states in zip(*of_passes, strict=True)
    )
    return keys, values


def beside(num_blocks: int, length: int) -> DynamicCache:
    """A cache for tokens that stand behind `length` others, and find these elsewhere (`context_attention`)."""
    cache = DynamicCache()
    cache.layers.extend(_NotKept(length) for _ in range(num_blocks))
    return cache


def reopened(context: ContextCache, length: int) -> DynamicCache:
    """A cache over the kept keys and values of one pass; what is appended leaves them as they are."""
    cache = DynamicCache()
    [one_pass] = context
    for states in one_pass:
        if states is None:
            cache.layers.append(_NotRead(length))
            continue
        cache.layers.append(_holding(DynamicLayer(), states))
    return cache


def ending(cache: DynamicCache, num_blocks: int) -> DynamicCache:
    """A cache that goes on from another one, and whose first pass ends in the last block, by `ContextComplete`."""
    layers = [DynamicLayer() for _ in range(num_blocks - 1)] + [_EndsOnce()]
    # before any pass, a cache has no layers yet
    for layer, (keys, values, *_) in zip(layers, cache, strict=False):
        _holding(layer, (keys, values))
    going_on = DynamicCache()
    going_on.layers.extend(layers)
    return going_on


def _holding(layer: DynamicLayer, states: tuple[Tensor, Tensor]) -> DynamicLayer:
    """The layer, with keys and values set directly, as `update` would copy them once more."""
    layer.lazy_initialization(*states)
    layer.keys, layer.values = states
    return layer
