"""Best of N: how faithful a text the decoder can write, if the lens picks among several."""

import math

import torch
from torch import Tensor

from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from ..straight_through import row_keys
from .evaluated import Batch, EvaluatedRows, check_finite, judge
from .metrics import share_recovered, squared_error


@torch.no_grad()
def best_of_n(evaluated: EvaluatedRows, count: int = 16, seed: int = 0) -> dict[str, dict[str, float]]:
    """FVE and KL recovered of the best of the first n = 1, 2, 4, ..., `count` sampled texts of each row.

    The best is the one whose reconstruction has the smallest squared error. To know it takes A and the lens's own
    reconstruction alone, so whoever uses the lens may choose in the same way; the subject has no say in it, and KL is
    only what the choice turned out to be worth. The draws of a smaller n are the first of a larger one, so FVE never
    falls as n grows.

    Args:
        evaluated: the rows; their greedy texts are not used.
        count: texts drawn for each row, at temperature 1.
        seed: of the draws, which belong to a row and do not depend on its batch.

    Returns:
        n as a string -> `fve` and `kl_recovered`.

    Raises:
        ValueError: if `count` is below 1, or a reconstruction or a KL is not finite.
    """
    if count < 1:
        raise ValueError(f"best_of_n: count must be at least 1, got {count}")
    lens, sizes = evaluated.lens, nested_sizes(count)
    errors, kls, variance = [], [], []
    for _, batch in evaluated:
        kept, kept_errors = best_reconstructions(lens, batch, sizes, seed)
        mean = lens.mean.expand_as(batch["activations"])[:, None]
        original, logits = judge(lens.subject, batch, torch.cat([kept, mean], dim=1))
        kl = kl_divergence(original.expand_as(logits), logits)
        check_finite("the KL of the sampled texts", kl)
        errors.append(kept_errors)
        kls.append(kl.cpu().double())
        variance.append(squared_error(batch["activations"].cpu(), lens.mean.cpu()))
    *kl_sums, kl_of_mean = torch.cat(kls).sum(dim=0)
    explained = share_recovered(torch.cat(errors).sum(dim=0), torch.cat(variance).sum())
    return {
        str(size): {"fve": float(fve), "kl_recovered": float(share_recovered(kl, kl_of_mean))}
        for size, fve, kl in zip(sizes, explained, kl_sums, strict=True)
    }


def nested_sizes(count: int) -> list[int]:
    """The powers of two below `count`, and `count`."""
    return [*(2**power for power in range(math.ceil(math.log2(count)))), count]


def best_reconstructions(
    lens: ConsistencyLensModel, batch: Batch, sizes: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """For each of n sizes the best Â of that many draws, (B, n, d), and its |A - Â|², (B, n) float64 on the CPU."""
    activations = batch["activations"]
    target, best = activations.cpu(), activations
    best_errors = torch.full((len(target),), math.inf, dtype=torch.float64)
    kept, kept_errors = [], []
    # Draw by draw: memory does not grow with the number of draws.
    for draw in range(sizes[-1]):
        ids = lens.decode_ids(activations, keys=row_keys(seed, 0, batch["rows"], draw))
        reconstructions = lens.encode(ids)
        check_finite("the reconstructions of the sampled texts", reconstructions)
        errors = squared_error(target, reconstructions.cpu())
        better = (errors < best_errors).to(reconstructions.device)
        best = torch.where(better[:, None], reconstructions, best)
        best_errors = torch.minimum(errors, best_errors)
        if draw + 1 in sizes:
            kept.append(best)
            kept_errors.append(best_errors)
    return torch.stack(kept, dim=1), torch.stack(kept_errors, dim=1)
