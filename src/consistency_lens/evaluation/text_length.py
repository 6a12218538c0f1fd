"""Text length: what the lens's words are worth to an encoder that reads only t of their T tokens.

An encoder that was never trained on parts of a text loses more by the cut than the words do: `prefix_budgets` and
`shorter_share` train it on them. The true end of the context, cut alike, shows how much that is.
Shapes: N rows, B rows in a batch, T text tokens, d width, n lengths.
"""

from typing import Any

import torch
from torch import Tensor

from ..losses import kl_divergence
from .best_of_n import nested_sizes
from .evaluated import Batch, EvaluatedRows, check_finite, judge
from .metrics import (
    bootstrap_sums,
    first_kept,
    last_kept,
    percentile_interval,
    share_recovered,
    squared_error,
)

# part of `text_length` -> what is read
PARTS = {
    "first": "the first tokens of the lens's text",
    "last": "the last tokens of the lens's text",
    "context_tail": "the true last tokens of the context",
}
ALL_LENGTHS = 8  # up to here every length is read, of longer texts the powers of two


@torch.no_grad()
def text_length(evaluated: EvaluatedRows, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """FVE and KL recovered by how many tokens of a text the encoder reads.

    A text that is shorter than t is read whole.

    Args:
        evaluated: the rows with the lens's texts.
        num_bootstrap: resamples of documents that the intervals are taken from.
        seed: of the resamples.

    Returns:
        - `tokens`: the lengths t, ascending, T the last.
        - of each of `PARTS`, with one entry for each t: `fve`, `kl_recovered`, and their 95% intervals `fve_ci95` and
          `kl_recovered_ci95`, each [low, high].

    Raises:
        ValueError: if a reconstruction or a KL is not finite.
    """
    lengths = text_lengths(evaluated.text_ids.shape[1])
    parts = [row_values(evaluated, rows, batch, lengths) for rows, batch in evaluated]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    resampled = bootstrap_sums(columns, evaluated.column("document"), num_bootstrap, seed)
    sums = {name: column.sum() for name, column in columns.items()}
    found: dict[str, Any] = {"tokens": lengths}
    for part in PARTS:
        found[part] = {}
        for name, addend, baseline in (("fve", "error", "variance"), ("kl_recovered", "kl", "kl.mean")):
            losses = [f"{addend}.{part}.{length}" for length in lengths]
            intervals = [percentile_interval(share_recovered(resampled[of], resampled[baseline])) for of in losses]
            found[part][name] = [float(share_recovered(sums[of], sums[baseline])) for of in losses]
            found[part][f"{name}_ci95"] = [list(interval) for interval in intervals]
    return found


def text_lengths(num_text_tokens: int) -> list[int]:
    """The lengths that are read of texts of T tokens."""
    if num_text_tokens <= ALL_LENGTHS:
        return list(range(1, num_text_tokens + 1))
    return nested_sizes(num_text_tokens)


def row_values(evaluated: EvaluatedRows, rows: slice, batch: Batch, lengths: list[int]) -> dict[str, Tensor]:
    """Addends (B,) of one batch: `variance`, `kl.mean`, and `error.<part>.<t>` and `kl.<part>.<t>`."""
    lens, target = evaluated.lens, batch["activations"].cpu()
    ids, mask = (tensor[rows].to(lens.device) for tensor in (evaluated.text_ids, evaluated.text_mask))
    texts = {"first": (ids, mask, first_kept), "last": (ids, mask, last_kept)}
    texts["context_tail"] = (batch["tail_ids"], batch["tail_mask"], last_kept)
    reconstructions = {
        f"{part}.{length}": lens.read_ids(of, cut(whole, length))
        for part, (of, whole, cut) in texts.items()
        for length in lengths
    }
    reconstructions["mean"] = lens.mean.expand_as(batch["activations"])
    original, logits = judge(lens.subject, batch, torch.stack(list(reconstructions.values()), dim=1))
    kl = kl_divergence(original.expand_as(logits), logits)
    check_finite("the KL of shorter texts", kl)
    values = {f"kl.{name}": column.cpu().double() for name, column in zip(reconstructions, kl.unbind(1), strict=True)}
    values |= {f"error.{name}": squared_error(target, of.cpu()) for name, of in reconstructions.items()}
    return values | {"variance": values.pop("error.mean")}
