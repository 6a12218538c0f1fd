"""Edit-and-steer: whether a changed word of the lens's text changes what the subject says next."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..modeling_consistency_lens import ConsistencyLensModel
from .controls import rows_of_other_documents
from .evaluated import Batch, EvaluatedRows, check_finite, judge

# The controls, in the order of their directions after the edit's.
RANDOM_STEPS = ("random_token", "random_direction")


@torch.no_grad()
def edit_and_steer(evaluated: EvaluatedRows, seed: int, rows: int) -> dict[str, Any]:
    """Replaces the last token of a row's text by that of another row's, a donor's, and follows the donor's next token.

    The subject goes on from A + E(edited) - E(text). The *target* is the token that it finds likeliest with the
    donor's activation, the *own top* the one that it finds likeliest with A. If the words mean to the subject what
    they mean to the lens, the target rises and the own top falls, and more so than in the controls, whose steps are
    as long: `random_token` replaces the last token by another one that ends the text of any row, `random_direction`
    steps anywhere.
    A target is unlikely at first, and any step that blurs the prediction raises it: what counts is the difference
    from the controls.

    Args:
        evaluated: the rows with the lens's texts.
        seed: of the choice of rows and donors, and of the controls.
        rows: at most so many are steered.

    Returns:
        - `rows`: how many were steered; with none, all numbers are 0.
        - `target_logprob_change`, `own_top_logprob_change`: mean change of log p, in nats.
        - `target_rises`: the share of rows in which the target's log p rises.
        - `controls.random_token`, `controls.random_direction`: the same three numbers of each.

    Raises:
        ValueError: if `rows` is below 1, all rows are of one document or a change is not finite.
    """
    lens, text_ids = evaluated.lens, evaluated.text_ids
    generator = torch.Generator().manual_seed(seed)
    ends = last_indices(lens, text_ids)
    last_tokens = text_ids.gather(1, ends)[:, 0]
    picked, donors, tops = choose_pairs(evaluated, last_tokens, rows, generator)
    # that of a third row, so that it is as common a token as the donor's; and not the row's own, which is no step
    strangers = rows_of_other_documents(last_tokens, generator)[picked] if len(picked) > 0 else picked
    random_tokens = last_tokens[strangers]
    noise = torch.randn(len(picked), len(lens.mean), generator=generator)

    changes = [torch.zeros(0, 1 + len(RANDOM_STEPS), 2, dtype=torch.float64)]
    for places, batch in selected(evaluated, picked):
        own, donor = picked[places], donors[places]
        replacements = torch.stack([last_tokens[donor], random_tokens[places]], dim=1)
        edits = edit_directions(lens, text_ids[own], ends[own], replacements)
        directions = torch.cat([edits, noise[places, None].to(edits)], dim=1)
        changes.append(steered_changes(lens, batch, directions, torch.stack([tops[donor], tops[own]], dim=1)))
    edit, *controls = torch.cat(changes).unbind(dim=1)
    named = {name: summary(control) for name, control in zip(RANDOM_STEPS, controls, strict=True)}
    return {"rows": len(picked), **summary(edit), "controls": named}


def choose_pairs(
    evaluated: EvaluatedRows, last_tokens: Tensor, rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """At most `rows` random rows, each with a donor of another document whose text ends in another token.

    Pairs that share the likeliest next token have nothing to steer to and are left out.

    Args:
        evaluated: the N rows.
        last_tokens: (N,) of their texts.
        rows: how many pairs are tried.
        generator: of the choice.

    Returns:
        The rows (n,), ascending; their donors (n,); the likeliest next token of those among all rows, (N,).
    """
    documents = evaluated.column("document")
    if rows < 1:
        raise ValueError(f"steering: rows must be at least 1, got {rows}")
    if len(documents.unique()) < 2:
        raise ValueError(
            f"steering: needs rows of two documents at least, got {len(documents)} rows of one; "
            "add documents or leave it out of `checks`"
        )
    donors = rows_of_other_documents(documents, generator)
    suitable = (last_tokens != last_tokens[donors]).nonzero().flatten()
    picked = suitable[torch.randperm(len(suitable), generator=generator)[:rows]].sort().values
    tops = likeliest_next(evaluated, torch.cat([picked, donors[picked]]).unique())
    picked = picked[tops[picked] != tops[donors[picked]]]
    return picked, donors[picked], tops


def last_indices(lens: ConsistencyLensModel, text_ids: Tensor) -> Tensor:
    """Where each text (N, T) has its last token, (N, 1): before the stop token, where the decoder has one."""
    return lens.text_mask(text_ids).sum(dim=1, keepdim=True) - 1


def selected(evaluated: EvaluatedRows, picked: Tensor) -> Iterator[tuple[slice, Batch]]:
    """The batches cut down to the rows `picked` (n,), ascending, each with where its rows stand among the n."""
    for rows, batch in evaluated:
        start, stop = torch.searchsorted(picked, torch.tensor([rows.start, rows.stop])).tolist()
        if start < stop:
            inside = (picked[start:stop] - rows.start).to(evaluated.lens.device)
            yield slice(start, stop), {name: tensor[inside] for name, tensor in batch.items()}


def likeliest_next(evaluated: EvaluatedRows, picked: Tensor) -> Tensor:
    """The subject's likeliest next token at the rows `picked`, ascending, as one of all rows (N,); -1 elsewhere."""
    tops = torch.full((len(evaluated.text_ids),), -1)
    for places, batch in selected(evaluated, picked):
        context = evaluated.lens.subject.context(
            batch["input_ids"], batch["attention_mask"], batch["positions"][:, None]
        )
        tops[picked[places]] = context.logits[:, 0].argmax(-1).cpu()
    return tops


def edit_directions(lens: ConsistencyLensModel, text_ids: Tensor, ends: Tensor, replacements: Tensor) -> Tensor:
    """E(edited) - E(text), (B, n, d), of texts (B, T) whose token at `ends` (B, 1) is replaced by each of (B, n)."""
    edited = [lens.encode(text_ids.scatter(1, ends, tokens[:, None])) for tokens in replacements.unbind(dim=1)]
    return torch.stack(edited, dim=1) - lens.encode(text_ids)[:, None]


def steered_changes(lens: ConsistencyLensModel, batch: Batch, directions: Tensor, tokens: Tensor) -> Tensor:
    """What steps from A change in log p, (B, n, k) float64 nats on the CPU.

    Args:
        lens: whose subject is steered.
        batch: B rows, on the lens's device.
        directions: (B, n, d); all are taken as long as the first.
        tokens: (B, k) whose log-probabilities are followed.
    """
    steps = directions[:, :1].norm(dim=-1, keepdim=True) * normalize(directions, dim=-1)
    original, logits = judge(lens.subject, batch, batch["activations"][:, None] + steps)
    followed = tokens[:, None].to(logits.device)
    before = original.float().log_softmax(-1).gather(-1, followed)
    after = logits.float().log_softmax(-1).gather(-1, followed.expand(-1, logits.shape[1], -1))
    check_finite("the changes of log p under steering", after - before)
    return (after - before).cpu().double()


def summary(changes: Tensor) -> dict[str, float]:
    """Of the changes (N, 2) of log p of target and own top; zeros where there are no rows."""
    if len(changes) == 0:
        changes = changes.new_zeros(1, 2)
    target, own_top = changes.unbind(dim=1)
    return {
        "target_logprob_change": float(target.mean()),
        "own_top_logprob_change": float(own_top.mean()),
        "target_rises": float((target > 0).double().mean()),
    }
