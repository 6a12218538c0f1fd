"""Passes of a language model one behind the other, each over the keys and values of those before it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

# The keys and values of each block, (B, heads, tokens, width of a head), for the tokens of one pass.
KeysAndValues = tuple[tuple[Tensor, Tensor], ...]
# embeddings (B, C, d) and a cache that grows by them -> what is wanted of the last of them, (B, ...)
Pass = Callable[[Tensor, DynamicCache], Tensor]


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


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Lets the blocks of a model run as they are: a checkpointed one drops the cache that it is handed, in silence."""
    switched: list = checkpointed_modules(model)
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True
