"""Attention of a text's next token to all tokens before it, whose keys and values stay in one place.

The usual way appends the keys and values of a token to those before. That copies all of them once a token, keeps every
copy for the backward pass, and there makes a gradient of each, to be added up: what is kept of them grows with the
square of the text. Here the tokens of a block share one buffer, and one buffer of gradients.
Shapes: L tokens so far, B sequences, h key-value heads, g query heads of each, w width of a head.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from .attention import attending_by
from .cached_passes import Pass, evaluating, keys_and_values, without_checkpoints
from .context_cache import beside
from .residual_stream import headless
from .summed_gradient import BackwardSum

# Code that came with an artifact may run beside the installed package, and each has a text of its own.
NAME = __name__

logger = logging.getLogger(__name__)
_works: dict[tuple[type, str], bool] = {}
_text: ContextVar["TextPasses"] = ContextVar("text")


class TextPasses:
    """Runs a model over the next token of B sequences, pass after pass (see `cached_passes.CachedPasses`).

    Args:
        one_pass: runs the model.
        model: the model, one that `can_attend`.
        past: keys and values of the tokens before the first pass.
        room: how many passes there will be at most.
    """

    def __init__(self, one_pass: Pass, model: PreTrainedModel, past: DynamicCache, room: int) -> None:
        self.one_pass, self.model = one_pass, model
        self.length = past.get_seq_length()
        self.blocks, self.anchors = [], []
        for keys, values in keys_and_values(past):
            block = _Block(keys, values, self.length + room)
            self.blocks.append(block)
            self.anchors.append(_Begin.apply(keys, values, block))

    def __call__(self, embeddings: Tensor, around: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
        """What the pass gives for the next tokens, whose embeddings are (B, 1, d); `around`: as in `CachedPasses`."""
        token = _text.set(self)
        try:
            with around(), attending_by(self.model, NAME):
                result = self.one_pass(embeddings, beside(len(self.blocks), self.length))
        finally:
            _text.reset(token)
        self.length += 1
        return result


def can_attend(model: PreTrainedModel, length: int) -> bool:
    """Whether the tokens of sequences of `length` may attend to each other in this way."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return all(window is None or window >= length for window in windows) and _exchanges_attention(model)


def _exchanges_attention(model: PreTrainedModel) -> bool:
    """Whether `attend` does in this architecture what its own attention does, which is tried once a process."""
    architecture = (type(model), model.config.to_json_string(use_diff=False))
    if architecture not in _works:
        try:
            _works[architecture] = _is_right(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code does with an attention that it does not know
            logger.debug("%s: the tokens of a text append keys and values: %s", type(model).__name__, error)
            _works[architecture] = False
    return _works[architecture]


@torch.no_grad()
def _is_right(model: PreTrainedModel) -> bool:
    """Runs two rows of four tokens at once, and two of them one by one."""
    decoder, table = headless(model), model.get_input_embeddings()
    weight = table.get_parameter("weight")
    embeddings = table(torch.arange(8, device=weight.device).view(2, 4) % len(weight))

    def run(inputs: Tensor, cache: DynamicCache) -> Tensor:
        return decoder(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    # what is float32 is compared in float32; in half precision, adapters may need the autocast that is on
    exact = torch.autocast(weight.device.type, enabled=False) if model.dtype == torch.float32 else nullcontext()
    # dropout would make two things of one, and draw numbers that a run that is resumed does not draw again
    with evaluating(model), without_checkpoints(model), exact:
        expected, past = run(embeddings, DynamicCache()), DynamicCache()
        run(embeddings[:, :2], past)
        text = TextPasses(run, model, past, room=2)
        begun = list(text.anchors)
        for token in embeddings[:, 2:].split(1, dim=1):
            state = text(token)
    everywhere = all(anchor is not first for anchor, first in zip(text.anchors, begun, strict=True))
    tolerance = max(1e-3, *(torch.finfo(dtype).eps ** 0.5 for dtype in (model.dtype, expected.dtype)))
    return everywhere and bool((state - expected).norm() <= tolerance * expected.norm())


class _Block:
    """Keys and values of all tokens in one block, (L, B, h, w), and what their gradients add up to."""

    def __init__(self, keys: Tensor, values: Tensor, size: int) -> None:
        batch, heads, length, width = keys.shape
        self.keys, self.values = (part.new_empty(size, batch, heads, width) for part in (keys, values))
        for part, given in ((self.keys, keys), (self.values, values)):
            part[:length] = given.detach().permute(2, 0, 1, 3)
        self.of_keys, self.of_values = BackwardSum(self.keys), BackwardSum(self.values)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """What a block calls as its attention: query (B, h g, 1, w), key and value (B, h, 1, w) of the next token.

    Returns:
        (B, 1, h g, w), and no weights.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("scores are neither bounded here nor led into sinks")
    index: Any = module.layer_idx
    text = _text.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The uses of a block hang on each other, so that autograd comes to a token after all that have read it.
    read, text.anchors[index] = _Attend.apply(
        query[:, :, 0], key[:, :, 0], value[:, :, 0], text.anchors[index], text.blocks[index], text.length, scaling
    )
    return read[:, None], None


AttentionInterface.register(NAME, attend)


class _Begin(torch.autograd.Function):
    """Gives the tokens before a text the gradient of their keys and values, once all of the text has had its turn."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, _values: Tensor, block: _Block) -> Tensor:
        ctx.block, ctx.length = block, keys.shape[2]
        return keys.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor | None, ...]:
        totals = (ctx.block.of_keys.take(), ctx.block.of_values.take())
        return *(None if total is None else total[: ctx.length].permute(1, 2, 0, 3) for total in totals), None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, block: _Block, before: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        block.keys[before], block.values[before] = key, value
        keys, values = (part[: before + 1, :, :, None] for part in (block.keys, block.values))
        wide = torch.promote_types(query.dtype, torch.float32)
        scaled = query.unflatten(1, (key.shape[1], -1)).to(wide) * scaling  # (B, h, g, w)
        weights = (scaled * keys).sum(dim=-1, keepdim=True).softmax(dim=0)  # (L, B, h, g, 1)
        ctx.save_for_backward(scaled, weights)
        ctx.block, ctx.scaling, ctx.query_dtype = block, scaling, query.dtype
        read = (weights * values).sum(dim=0)
        return read.flatten(1, 2).to(value.dtype), torch.zeros_like(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _of_anchor: Tensor) -> tuple[Tensor | None, ...]:
        scaled, weights = ctx.saved_tensors
        block, count = ctx.block, len(weights)
        keys, values = (part[:count, :, :, None] for part in (block.keys, block.values))
        grad = grad.unflatten(1, scaled.shape[1:3]).to(scaled.dtype)
        of_weights = (grad * values).sum(dim=-1, keepdim=True)
        of_scores = of_weights.sub_((weights * of_weights).sum(dim=0)).mul_(weights)
        of_query = (of_scores * keys).sum(dim=0).mul_(ctx.scaling)
        of_keys, of_values = block.of_keys.buffer()[:count], block.of_values.buffer()[:count]
        _add_products(of_keys, of_scores, scaled)
        _add_products(of_values, weights, grad)
        of_query = of_query.flatten(1, 2).to(ctx.query_dtype)
        return of_query, of_keys[-1], of_values[-1], grad.new_zeros(()), None, None, None


def _add_products(total: Tensor, factors: Tensor, vectors: Tensor) -> None:
    """Adds vectors (B, h, g, w) times factors (L, B, h, g, 1), summed over a group, to a total (L, B, h, w)."""
    if factors.shape[3] == 1 and total.dtype == vectors.dtype:
        total.addcmul_(factors[:, :, :, 0], vectors[:, :, 0])
    else:
        total.add_((factors * vectors).sum(dim=3))
