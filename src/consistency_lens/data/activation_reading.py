"""Reading a subject's activations at chosen positions: no block above the highest layer, in batches of like length."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from ..residual_stream import ResidualStream
from ..turns import in_turn
from .cache_plan import ShardPlan


class ActivationReader:
    """Runs a subject over the sequences of a shard.

    Args:
        stream: of the subject, in evaluation mode.
        batch_size: see `length_buckets`.
    """

    def __init__(self, stream: ResidualStream, batch_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size

    def read(
        self, shard: ShardPlan, layers: Sequence[int], count: Callable[[int, int], None] | None = None
    ) -> list[np.ndarray]:
        """Activations (N, d) float32 of a shard's rows, in order, at each of the layers.

        Each sequence runs once, no further than its last position and the highest layer.

        Args:
            shard: N rows.
            layers: blocks, ascending.
            count: called after each batch with its rows and tokens.

        Raises:
            ValueError: if an activation is not finite, or a batch does not fit the device.
        """
        first_row = np.cumsum([0] + [len(positions) for positions in shard.positions])
        found = [np.empty((first_row[-1], self.stream.width), dtype=np.float32) for _ in layers]
        for batch in length_buckets([len(context) for context in shard.contexts], self.batch_size):
            hidden = self._hidden([shard.contexts[sequence] for sequence in batch], layers)
            counts = [len(shard.positions[sequence]) for sequence in batch]
            places = torch.from_numpy(np.repeat(np.arange(len(batch)), counts))
            positions = torch.from_numpy(np.concatenate([shard.positions[sequence] for sequence in batch]))
            rows = np.concatenate([np.arange(first_row[sequence], first_row[sequence + 1]) for sequence in batch])
            for activations, states in zip(found, hidden, strict=True):
                activations[rows] = states[places, positions].float().cpu().numpy()
            if count is not None:
                count(len(rows), sum(len(shard.contexts[sequence]) for sequence in batch))
        for layer, activations in zip(layers, found, strict=True):
            self._check_finite(activations, shard, layer)
        return found

    @torch.no_grad()
    def _hidden(self, contexts: Sequence[np.ndarray], layers: Sequence[int]) -> list[Tensor]:
        """Outputs (B, S, d) of the blocks `layers` (ascending); blocks above and the head do not run."""
        input_ids = np.zeros((len(contexts), max(len(context) for context in contexts)), dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, context in enumerate(contexts):
            input_ids[index, : len(context)] = context
            attention_mask[index, : len(context)] = 1
        device = self.stream.input_embedding.get_parameter("weight").device
        if device.type == "meta":
            # An offloaded embedding: accelerate takes the tokens to where it runs.
            device = torch.device("cpu")
        with in_turn(self.stream.model), ExitStack() as stack:
            captures = [stack.enter_context(self.stream.capture(layer, stop=layer == layers[-1])) for layer in layers]
            try:
                self.stream.model(
                    input_ids=torch.from_numpy(input_ids).to(device),
                    attention_mask=torch.from_numpy(attention_mask).to(device),
                    use_cache=False,
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"activation cache: the device has no room for {input_ids.shape[0]} sequences of "
                    f"{input_ids.shape[1]} tokens in one pass; lower batch_size from {self.batch_size}"
                ) from error
        return [capture.activations for capture in captures]

    def _check_finite(self, activations: np.ndarray, shard: ShardPlan, layer: int) -> None:
        bad = np.flatnonzero(~np.isfinite(activations).all(axis=1))
        if len(bad) == 0:
            return
        document = np.repeat(shard.documents, [len(positions) for positions in shard.positions])[bad[0]]
        position = np.concatenate(shard.positions)[bad[0]]
        if self.stream.model.dtype == torch.float16:
            mend = "float16 overflows in this subject: load it in float32 (--dtype float32) or bfloat16"
        else:
            mend = "check the subject's weights"
        raise ValueError(
            f"activation cache: {len(bad)} of {len(activations)} activations of layer {layer} are not finite (the "
            f"first at position {position} of document {document}); {mend}"
        )


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Indices of sequences, longest first, in batches of like length.

    Args:
        lengths: tokens of each sequence, at least one.
        batch_size: sequences in the first batch. Every batch has at most as many tokens, padding included, as that
            one, so shorter sequences come in larger batches.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    most_tokens = batch_size * lengths[order[0]]
    batches = []
    while len(order):
        size = most_tokens // lengths[order[0]]
        batches.append(order[:size])
        order = order[size:]
    return batches
