"""Attention of new tokens to a context that has no gradient: each to the tokens before it, and to itself.

The usual way appends new keys and values to those of the context. That copies the whole context for the sake of one
token, and the backward pass makes a gradient for all of it. Here the context stays where it is: a token's scores to it
and to itself meet in one softmax.
Shapes: B sequences, K new tokens of each, S tokens of a context, w width of a head; n sequences of one pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .attention import attending_by
from .context_cache import ContextCache

# Code that came with an artifact may run beside the installed package, and each has a context of its own.
NAME = __name__

_context: ContextVar[ContextCache] = ContextVar("context")


@contextmanager
def attending_to(model: PreTrainedModel, context: ContextCache) -> Iterator[None]:
    """Has the tokens that a model runs attend to a context, where its attention is one that transformers exchanges.

    Its cache is then `context_cache.beside`, and its 4-D mask that of the context with the new tokens behind it.
    """
    token = _context.set(context)
    try:
        with attending_by(model, NAME):
            yield
    finally:
        _context.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """What a block calls as its attention. In a block that keeps no context, a token sees itself alone.

    Args:
        module: the block's attention, which knows its index.
        query: (B, heads, K, w).
        key, value: of the new tokens, (B, key-value heads, K, w).
        attention_mask: to be added to scores, (B, 1, K, S + K), where S is the longest context's.
        scaling: of scores; w^-1/2 by default.
        softcap: what bounds scores (Gemma 2), if anything.

    Returns:
        (B, K, heads, w), and no weights.
    """
    index: Any = module.layer_idx
    states = [one_pass[index] for one_pass in _context.get()]
    num_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    if states[0] is None:
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None
    # the heads of a group read the same keys: (B, key-value heads, group, K, w)
    query = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)).unflatten(1, (num_heads, groups))
    own_scores, value = (query * key[:, :, None]).sum(dim=-1, keepdim=True), value[:, :, None]
    sizes = [len(keys) for keys, _ in states]
    parts = zip(*(tensor.split(sizes) for tensor in (query, own_scores, value, attention_mask)), strict=True)
    read = [_read(keys, values, softcap, *part) for (keys, values), part in zip(states, parts, strict=True)]
    return torch.cat(read).flatten(1, 2).transpose(1, 2).contiguous(), None


def _read(
    keys: Tensor, values: Tensor, softcap: float | None, query: Tensor, own_scores: Tensor, value: Tensor, mask: Tensor
) -> Tensor:
    """What tokens (n, key-value heads, group, K, w) of one pass read from its context and themselves."""
    length, grouped = keys.shape[2], query.shape[2:4]
    scores = torch.cat([(query.flatten(2, 3) @ keys.mT).unflatten(2, grouped), own_scores], dim=-1)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    # nothing hides a token from itself
    scores[..., :length] += mask[:, :, None, :, :length]
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    read = (weights[..., :length].flatten(2, 3) @ values).unflatten(2, grouped)
    return read + weights[..., length:] * value


AttentionInterface.register(NAME, attend)
