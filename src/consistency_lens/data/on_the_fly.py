"""Activations on the fly: the subject runs when a row is asked for, and nothing is stored.

The rows are those that a cache of the same corpus and settings would hold, in the same order, so training on either
gives the same losses, where mean and RMS are the same (`OnTheFlyActivations.own_moments`). Training reads their
contexts alone (`ContextRows`); the trainer runs the subject on the batch (`read_activations`), and where the loss asks
for the KL, what that pass has kept of the context makes it cost one token more.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..context_length import context_length
from ..residual_stream import gather_positions
from ..subject import Subject, in_passes
from .activation_reading import ActivationReader
from .activation_source import BLOCK_ROWS, ActivationSource, SourceRows
from .cache_plan import CachePlan, ShardPlan, plan_cache
from .moments import Moments, streaming_moments
from .shared_contexts import ReadPlaces

MOMENT_SEQUENCES = 8192  # sequences whose rows mean and RMS are taken from


class OnTheFlyActivations(ActivationSource):
    """The rows of a plan, read from the subject whenever they are asked for.

    Args:
        subject: the model being read.
        plan: which sequences are read, at which positions.
        provenance: what the rows come from.
        batch_size: sequences in a pass of the subject where activations are read by index, as evaluation does.
        rows, training_part: see `ActivationSource`.
    """

    def __init__(
        self,
        subject: Subject,
        plan: CachePlan,
        provenance: dict[str, Any],
        batch_size: int = 32,
        rows: np.ndarray | None = None,
        training_part: ActivationSource | None = None,
    ) -> None:
        self._first_rows = np.cumsum(plan.sequence_rows) - plan.sequence_rows
        num_rows = int(plan.sequence_rows.sum())
        super().__init__(provenance, np.arange(num_rows) if rows is None else rows, training_part)
        self.subject = subject
        self.plan = plan
        self.batch_size = batch_size

    @classmethod
    def from_corpus(
        cls,
        subject: Subject,
        corpus: Dataset,
        provenance: dict[str, Any],
        *,
        positions_per_sequence: int,
        min_position: int,
        seed: int,
        batch_size: int = 32,
    ) -> "OnTheFlyActivations":
        """The rows that `build_activation_cache` would write with these arguments.

        Args:
            provenance: what is known of subject and corpus; positions, counts and hash are added to it.

        Raises:
            ValueError: as `plan_cache`: for a corpus that does not fit the subject, or has no sequence long enough.
        """
        stream = subject.stream
        plan = plan_cache(
            corpus,
            positions_per_sequence=positions_per_sequence,
            min_position=min_position,
            rows_per_shard=1,  # there are no shards
            seed=seed,
            vocab_size=stream.input_embedding.get_parameter("weight").shape[0],
            max_length=context_length(stream.decoder.config),
        )
        facts = {
            "source": "on_the_fly",
            "layer": subject.layer,
            "width": stream.width,
            "positions": {"per_sequence": positions_per_sequence, "min_position": min_position},
            "dataset_hash": plan.dataset_hash,
            "seed": seed,
            "rows": int(plan.sequence_rows.sum()),
            "sequences": {"kept": len(plan.sequences), "skipped_too_short": plan.num_skipped},
        }
        return cls(subject, plan, provenance | facts, batch_size)

    @cached_property
    def documents(self) -> np.ndarray:
        """Document hash of every row, (N,) int64."""
        return self.plan.documents[self._sequences(self.rows)]

    def contexts(self, indices: np.ndarray) -> list[np.ndarray]:
        """Tokens 0..P of the given rows, int32."""
        shard, place, positions = self._lookup(indices)
        return [shard.contexts[i][: position + 1] for i, position in zip(place, positions, strict=True)]

    def activations(self, indices: np.ndarray) -> np.ndarray:
        """Activations of the given rows, (B, d) float32; the blocks above the layer do not run."""
        return self.read(indices)[0]

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Activations (B, d) float32 and contexts of the given rows; rows of one sequence are read in one pass.

        Raises:
            ValueError: if an activation is not finite, or a batch does not fit the device.
        """
        shard, place, positions = self._lookup(indices)
        contexts = [shard.contexts[i][: position + 1] for i, position in zip(place, positions, strict=True)]
        asked = [np.unique(positions[place == i]) for i in range(len(shard.contexts))]
        first = np.cumsum([0] + [len(of_sequence) for of_sequence in asked])
        reader = ActivationReader(self.subject.stream, self.batch_size)
        (found,) = reader.read(shard._replace(positions=asked), [self.subject.layer])
        rows = [first[i] + np.searchsorted(asked[i], p) for i, p in zip(place, positions, strict=True)]
        return found[rows], contexts

    def part(self, rows: np.ndarray, training_part: ActivationSource | None = None) -> "OnTheFlyActivations":
        """The rows with these indices in the whole."""
        return OnTheFlyActivations(self.subject, self.plan, self.provenance, self.batch_size, rows, training_part)

    def own_moments(self) -> Moments:
        """Mean and RMS of the rows of up to 8,192 sequences, spread evenly: those of a cache where there are no more.

        All sequences of a large corpus would be the long pass that is saved here.
        """
        of_row = self._sequences(self.rows)
        sequences = np.unique(of_row)
        spread = np.linspace(0, len(sequences) - 1, min(MOMENT_SEQUENCES, len(sequences))).astype(np.int64)
        chosen = np.flatnonzero(np.isin(of_row, sequences[spread]))
        blocks = np.split(chosen, range(BLOCK_ROWS, len(chosen), BLOCK_ROWS))
        return streaming_moments(self.activations(block) for block in blocks)

    def _sequences(self, rows: np.ndarray) -> np.ndarray:
        """For each row the index of its sequence among those of the plan."""
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def _lookup(self, indices: np.ndarray) -> tuple[ShardPlan, np.ndarray, np.ndarray]:
        """The sequences of the given rows, and for each row which of them it is of, and its position P."""
        rows = self.rows[indices]
        sequences = self._sequences(rows)
        distinct, place = np.unique(sequences, return_inverse=True)
        shard = self.plan.read(self.plan.sequences[distinct])
        kth = rows - self._first_rows[sequences]
        return shard, place, np.array([shard.positions[i][k] for i, k in zip(place, kth, strict=True)])


class ContextRows(SourceRows):
    """The rows of a source without their activations: the trainer reads these from the subject, batch by batch.

    `input_ids`, `position`, `document` and `row` as in `ActivationRows`; with `pair_seed`, `other_input_ids` is the
    context that A' is read from.
    """

    def columns(self, chosen: np.ndarray) -> dict[str, Any]:
        """The given rows, as columns of one length."""
        columns = self.known(chosen, self.source.contexts(chosen))
        if self.partners is not None:
            columns["other_input_ids"] = self.source.contexts(self.partners[chosen])
        return columns


def read_activations(
    subject: Subject, batch: dict[str, Any], keep_context: bool, with_head: bool = True
) -> dict[str, Any]:
    """A batch of contexts with the activations that the subject has at their ends.

    Args:
        subject: the model being read.
        batch: from `data.collator.ActivationCollator` or `data.shared_contexts.SharedContexts`, of `ContextRows`, on
            the subject's device.
        keep_context: whether the subject runs to its head and keeps what a later KL takes one token for. If not, the
            blocks above the layer do not run.
        with_head: whether the context has logits; if not, the hidden states that they are made of.

    Returns:
        The batch with `activations` (B, d) float32; `context`, a `subject.SubjectContext` read at P, where it was
        kept; and `other_activations` where the batch has contexts for them.
    """
    places = ReadPlaces.of(batch)
    inputs = (batch["input_ids"], batch["attention_mask"], places.positions)
    if keep_context:
        context = subject.context(*inputs, check=False, with_head=with_head, passes=places.passes)
        read = {"activations": places.of_rows(context.activations).float(), "context": context}
    else:
        parts = [
            gather_positions(subject.activations(ids, mask), positions)
            for ids, mask, positions in in_passes(places.passes, *inputs)
        ]
        read = {"activations": places.of_rows(torch.cat(parts)).float()}
    if "other_input_ids" in batch:
        hidden = subject.activations(batch["other_input_ids"], batch["other_attention_mask"])
        last = batch["other_attention_mask"].sum(dim=1, keepdim=True) - 1
        read["other_activations"] = gather_positions(hidden, last)[:, 0].float()
    return batch | read
