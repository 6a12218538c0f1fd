"""Next-token logits of many tokens: in hand, or made a few rows at a time where they are read, and then dropped.

With V = 128,000 the logits of a batch outweigh all else that a training step keeps. What is read of them is small: a
drawn token, its embedding, a log-probability, an entropy, a divergence. So the hidden states before the head are kept
in their place, and head and reader run together on one chunk of rows after the other; each chunk is a checkpoint,
whose logits are made once more in the backward pass. Nothing larger than a chunk x V is ever held.
Shapes: N rows (tokens), n rows of a chunk, d width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .plain_arithmetic import is_plain, plain_arithmetic
from .residual_stream import headless

# logits (n, V) and which of the N rows they are -> tensors (n, ...) by name
RowReader = Callable[[Tensor, slice], dict[str, Tensor]]


class TokenLogits(NamedTuple):
    """Logits of N tokens.

    Attributes:
        states: the logits themselves (N, V); with a head, the hidden states (N, d) that it makes them of.
        head: hidden states (n, d) -> logits (n, V), without anything random.
        chunk_size: rows that the head makes at a time.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None = None
    chunk_size: int = 0

    @classmethod
    def of(cls, states: Tensor, head: Callable[[Tensor], Tensor], chunk_size: int) -> "TokenLogits":
        """Of logits (..., V) if `chunk_size` is 0, else of hidden states (..., d) for `head`."""
        return cls(states.flatten(0, -2), head if chunk_size > 0 else None, chunk_size)

    def of_rows(self, rows: slice) -> Tensor:
        """The logits (n, V) of some rows."""
        states = self.states[rows]
        return states if self.head is None else self.head(states)

    def read(self, reader: RowReader) -> dict[str, Tensor]:
        """What a reader makes of all rows, (N, ...) by name; it has to do the same if it is called again."""
        head = self.head
        if head is None:
            return reader(self.states, slice(0, len(self.states)))

        plain = is_plain()  # it may be otherwise where the backward pass runs this again

        def head_and_reader(states: Tensor, rows: slice) -> dict[str, Tensor]:
            with plain_arithmetic(plain):
                return reader(head(states), rows)

        # ZeRO-3 has released a weight again before torch would compare its shape with that of the first run
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        parts, start = [], 0
        for states in self.states.split(self.chunk_size):
            rows = slice(start, start := start + len(states))
            parts.append(run(head_and_reader, states, rows))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The logits (n, V) that a causal language model makes of its last hidden states (n, d), final norm included.

    The model's own code runs, with its blocks left out: biases, adapters, factors and soft-caps are in it.
    """
    with _blocks_left_out(model):
        return model(inputs_embeds=states[None], use_cache=False).logits[0]


@contextmanager
def _blocks_left_out(model: PreTrainedModel) -> Iterator[None]:
    """Puts something that hands its input through in the place of all that comes before the head."""
    decoder = headless(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    parent_path, _, name = path.rpartition(".")
    # not by `setattr`: nothing that a wrapper has hung on the decoder, which keeps its place, may notice
    children: dict[str, nn.Module | None] = model.get_submodule(parent_path)._modules
    children[name] = _HandThrough()
    try:
        yield
    finally:
        children[name] = decoder


class _HandThrough(nn.Module):
    def forward(self, *_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> "_Handed":
        return _Handed(last_hidden_state=inputs_embeds)


@dataclass
class _Handed(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Whatever else an architecture hands on from its blocks (`router_logits`) is not there."""
        if name.startswith("__"):
            raise AttributeError(name)
