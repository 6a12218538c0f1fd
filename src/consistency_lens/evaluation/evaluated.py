"""The rows of one evaluation with the lens's texts, and the judgement of reconstructions by the subject."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.collator import ActivationCollator
from ..data.shared_contexts import ReadPlaces
from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from ..subject import Subject
from ..token_logits import TokenLogits

Batch = dict[str, Any]

# What training rows are drawn for, and how many are read at a time.
TRAINING_COLUMNS = ("activations", "tail_ids", "tail_mask")
TRAINING_BATCH = 1024


@dataclass(frozen=True)
class EvaluatedRows:
    """What every check of an evaluation looks at.

    Attributes:
        lens: in evaluation mode, with tokenizer, subject and statistics.
        batches: the held-out rows, collated, on the CPU; N rows in all.
        text_ids: (N, T) int64 on the CPU, the lens's greedy texts in the order of the rows.
    """

    lens: ConsistencyLensModel
    batches: list[Batch]
    text_ids: Tensor

    def __iter__(self) -> Iterator[tuple[slice, Batch]]:
        """The batches on the lens's device, each with where its rows stand among the N."""
        for rows, batch in numbered(self.batches):
            yield rows, {name: tensor.to(self.lens.device) for name, tensor in batch.items()}

    def column(self, name: str) -> Tensor:
        """A column of all rows, (N, ...), such as `activations`, `document` or `tail_ids`."""
        return torch.cat([batch[name] for batch in self.batches])

    @property
    def text_mask(self) -> Tensor:
        """What of the texts is text, (N, T) bool: what stands before the decoder's stop token, where it has one."""
        return self.lens.text_mask(self.text_ids)

    def texts(self) -> list[str]:
        """The lens's texts as strings, each up to its stop token where the decoder has one."""
        kept = [ids[mask] for ids, mask in zip(self.text_ids, self.text_mask, strict=True)]
        return self.lens.require_tokenizer().batch_decode(kept)


class NotFiniteError(ValueError):
    """Raised where an evaluation meets NaN or infinity."""


class Judgement(NamedTuple):
    """The subject's next-token logits (or the hidden states that it makes them of) with A, and with reconstructions in
    its place."""

    places: ReadPlaces
    """Where the rows of the batch stand."""
    before: Tensor
    """(N, K, V), with A."""
    after: Tensor
    """(N, K, n, V), with each of n reconstructions."""


def judge(subject: Subject, batch: Batch, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """What the subject predicts with A and with each of n reconstructions in its place; see `judge_places`.

    Returns:
        Logits of the rows, (B, 1, V) and (B, n, V).
    """
    places, before, after = judge_places(subject, batch, reconstructions)
    return places.of_rows(before)[:, None], places.of_rows(after)


def judged_kl(subject: Subject, batch: Batch, reconstructions: Tensor, chunk_size: int = 0) -> Tensor:
    """KL(p(.|A) || p(.|Â)) in nats for each of n reconstructions, (B, n, d) -> (B, n); see `judge_places`.

    Args:
        chunk_size: rows of logits held at a time (`token_logits`); 0 holds all of them.
    """
    places, before, after = judge_places(subject, batch, reconstructions, with_head=chunk_size == 0)
    if chunk_size == 0:
        return places.of_rows(kl_divergence(before[:, :, None].expand_as(after), after))
    # by rows and not by contexts, of which another process may have fewer, and then fewer chunks
    states = places.of_rows(after)
    with_a = TokenLogits.of(places.of_rows(before)[:, None].expand_as(states), subject.head, chunk_size)

    def read(logits: Tensor, rows: slice) -> dict[str, Tensor]:
        return {"kl": kl_divergence(with_a.of_rows(rows), logits)}

    return TokenLogits.of(states, subject.head, chunk_size).read(read)["kl"].view(states.shape[:2])


def judge_places(subject: Subject, batch: Batch, reconstructions: Tensor, with_head: bool = True) -> Judgement:
    """The subject with A and with each of n reconstructions in its place.

    One pass over the contexts, and one token for each reconstruction: those of a row are all queries at its position.

    Args:
        subject: the model being read.
        batch: from `data.collator.ActivationCollator` or `data.shared_contexts.SharedContexts`, on the subject's
            device. Where it brings the `context` of `data.on_the_fly.read_activations`, the pass over the contexts has
            been made.
        reconstructions: (B, n, d).
        with_head: if False, hidden states (..., d) stand for the logits (..., V), as they do in a `context` then.
    """
    places, count = ReadPlaces.of(batch), reconstructions.shape[1]
    num_queries = places.positions.shape[1] * count
    one_token = subject.check_one_token(batch["input_ids"].shape[1] + num_queries)
    context = batch.get("context")
    if context is None:
        inputs = (batch["input_ids"], batch["attention_mask"], places.positions)
        context = subject.context(*inputs, check=False, with_head=with_head, passes=places.passes)
    elif not one_token:
        context = context._replace(cache=None)
    queries = context._replace(positions=places.positions.repeat_interleave(count, dim=1))
    logits = subject.replaced_logits(queries, places.of_contexts(reconstructions).flatten(1, 2), with_head)
    return Judgement(places, context.logits, logits.unflatten(1, (-1, count)))


def numbered(batches: list[Batch]) -> Iterator[tuple[slice, Batch]]:
    """The batches, each with where its rows stand among all rows."""
    start = 0
    for batch in batches:
        stop = start + len(batch["positions"])
        yield slice(start, stop), batch
        start = stop


def training_sample(rows: Any, collator: ActivationCollator, count: int, seed: int) -> Batch:
    """At most `count` random rows as one batch, in the order of the cache, without their contexts.

    Args:
        rows: `Rows` of training documents.
        collator: for the lens's T.
        count: how many.
        seed: of the choice.

    Returns:
        `activations`, `tail_ids` and `tail_mask`, as the collator makes them.

    Raises:
        ValueError: if an activation is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:count].sort().values.tolist()
    # A loader reads the rows of a batch together. It draws a seed for its workers, here not from the global state.
    loader = DataLoader(rows, TRAINING_BATCH, sampler=chosen, collate_fn=collator, generator=generator)
    parts = [{name: batch[name] for name in TRAINING_COLUMNS} for batch in loader]
    sample = {name: torch.cat([part[name] for part in parts]) for name in TRAINING_COLUMNS}
    check_finite("the activations of the training rows", sample["activations"])
    return sample


def check_finite(name: str, tensor: Tensor) -> None:
    """Checks the rows of a tensor (N, ...).

    Raises:
        ValueError: if one holds NaN or infinity.
    """
    bad = (~torch.isfinite(tensor)).flatten(1).any(-1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
    if bad.any():
        raise NotFiniteError(
            f"evaluation: {name} hold NaN or infinity in {int(bad.sum())} of {len(bad)} rows of a batch; "
            "check the cache with consistency-lens verify, and the lens's weights"
        )
