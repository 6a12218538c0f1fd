"""Passes of a language model one behind the other, each over the keys and values of those before it."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from .residual_stream import headless

logger = logging.getLogger(__name__)
# The keys and values of each block, (B, heads, tokens, width of a head), for the tokens of one pass.
KeysAndValues = tuple[tuple[Tensor, Tensor], ...]
# How many tokens take as long as what a pass costs by itself: on other devices than a CPU, it starts hundreds of
# kernels, which a batch of few tokens does not fill. Only that of a CPU was measured.
PASS_COST, PASS_COST_ON_CPU = 2048, 32

# Kinds of blocks, as `layer_types` of a config names them, that keep keys and values and nothing else.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}

# embeddings (B, C, d) and a cache that grows by them -> what is wanted of the last of them, (B, ...)
Pass = Callable[[Tensor, DynamicCache], Tensor]


def cost_on(device: torch.device) -> int:
    """What a pass costs there by itself, in tokens."""
    return PASS_COST_ON_CPU if device.type == "cpu" else PASS_COST


def keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether keys and values are all that a model has to keep of the tokens before, in a cache that it is handed.

    Some models keep a state too or instead (Mamba, RWKV, LFM2), others keep nothing (GPT-1); and some of them take a
    cache without a word, and leave out what is in it. RoBERTa and its kin number the embeddings that they are handed
    from the start, whatever the cache holds.
    """
    if any(hasattr(module, "create_position_ids_from_inputs_embeds") for module in model.modules()):
        return False
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    takes_cache = "past_key_values" in inspect.signature(type(headless(model)).forward).parameters
    return takes_cache and not model._is_stateful and ATTENDING.issuperset(kinds)


class CachedPasses:
    """Runs a model over the next few tokens of B sequences, pass after pass.

    With `recompute` each pass is a checkpoint: its inputs are kept, namely the embeddings and the keys and values that
    each pass before has added, and its activations are computed anew in the backward pass. T passes of one token then
    keep T times the keys and values of a token, and never more than the activations of one pass.

    Args:
        one_pass: runs a model, whose own blocks are not checkpointed meanwhile (`without_checkpoints`).
        past: keys and values of the tokens before the first pass.
        recompute: whether passes are checkpoints.
    """

    def __init__(self, one_pass: Pass, past: DynamicCache, recompute: bool):
        self.one_pass = one_pass
        self.cache = past
        self.recompute = recompute
        self.past: list[KeysAndValues] = [keys_and_values(past)] if len(past) > 0 else []

    def __call__(self, embeddings: Tensor, around: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
        """What the pass gives for the next tokens, whose embeddings are (B, C, d).

        Args:
            embeddings: (B, C, d).
            around: makes a context that the model runs in, here and when it runs again.
        """
        if not self.recompute:
            return self.run(embeddings, self.cache, around)
        # nothing random runs in it, so there is no random state to keep
        result, added = checkpoint(
            self.run_behind, embeddings, list(self.past), around, use_reentrant=False, preserve_rng_state=False
        )
        self.past.append(added)
        return result

    def run_behind(
        self, embeddings: Tensor, past: list[KeysAndValues], around: Callable[[], AbstractContextManager]
    ) -> tuple[Tensor, KeysAndValues]:
        """What the pass gives, and the keys and values that it adds to those of the passes before."""
        blocks = [[torch.cat(parts, dim=2) for parts in zip(*block, strict=True)] for block in zip(*past, strict=True)]
        cache = DynamicCache([(keys, values) for keys, values in blocks]) if blocks else DynamicCache()
        result = self.run(embeddings, cache, around)
        count = embeddings.shape[1]
        # copies, for a view would keep the keys and values of all passes before, once for each pass
        added = [tuple(part[:, :, -count:].clone() for part in block) for block in keys_and_values(cache)]
        return result, tuple(added)  # type: ignore[arg-type]

    def run(self, embeddings: Tensor, cache: DynamicCache, around: Callable[[], AbstractContextManager]) -> Tensor:
        """What the pass gives; the cache grows."""
        with around():
            return self.one_pass(embeddings, cache)


def keys_and_values(cache: DynamicCache) -> KeysAndValues:
    """What a cache holds for each block."""
    return tuple((keys, values) for keys, values, *_ in cache)


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers recomputes in the backward pass of a training pass."""
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing", False)]


def without_checkpoints(model: nn.Module) -> AbstractContextManager[None]:
    """Lets the blocks of a model run as they are: a checkpointed one drops the cache that it is handed, in silence."""
    return not_checkpointed(checkpointed_modules(model))


@contextmanager
def not_checkpointed(modules: list[Any]) -> Iterator[None]:
    """The same for modules that were looked up before: a large model has thousands, and a text many passes."""
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode, and each of its modules back into the mode that it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


class PromptCache(NamedTuple):
    """What all rows begin with, after it has run.

    Attributes:
        cache: its keys and values, expanded to the rows.
        end: its last hidden state (d,), or 0 where there is no prompt. Rows read the keys and values of the last
            block, but nothing of its output; FSDP and ZeRO-3 gather a block's weights for the backward pass when the
            gradient of its output comes, so one has to come: add `nothing` to what is run next.
    """

    cache: DynamicCache
    end: Tensor | float

    @property
    def nothing(self) -> Tensor | float:
        """0, made of the last hidden state."""
        return (0 * self.end).sum() if isinstance(self.end, Tensor) else 0.0


def prompt_cache(model: PreTrainedModel, prompt: Tensor, batch: int) -> PromptCache:
    """Runs what `batch` rows begin with, the embeddings `prompt` (P, d), once and not once a row.

    The model is one without a head.
    """
    if len(prompt) == 0:
        return PromptCache(DynamicCache(), 0.0)
    once = DynamicCache()
    with without_checkpoints(model):
        output = model(inputs_embeds=prompt[None], past_key_values=once, use_cache=True)
    expanded = [(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values, *_ in once]
    return PromptCache(DynamicCache(expanded), output.last_hidden_state[0, -1])
