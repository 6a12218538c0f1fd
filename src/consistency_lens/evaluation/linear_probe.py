"""The linear-probe reference: which of the last tokens a linear readout of the activation names, and which the text.

The probe is linear discriminant analysis in closed form (Hastie et al. 2009, section 4.3). Least squares onto one-hot
tokens, the other closed form, hides common classes behind each other: on a small language model it named 57% of the
current tokens where this names 95%.
Shapes: n training rows, N held-out rows, C tokens seen in the training rows, T text tokens, d width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .controls import rows_of_other_documents
from .evaluated import Batch, EvaluatedRows

# Added to the covariance of standardised activations.
RIDGE = 1e-3
# How many rows at the overall mean are added to each token's own: none while tokens lie apart, more as they blur.
SHRINKAGES = (0, 10, 30, 100)
CHUNK_ROWS = 1024


class TokenClasses(NamedTuple):
    """What the activations of one token have in common, and how they scatter."""

    tokens: Tensor
    """(C,) int64, ascending."""
    counts: Tensor
    """(C,) rows of each."""
    sums: Tensor
    """(C, d) of the activations of each."""
    factor: Tensor
    """(d, d), Cholesky factor of the covariance within a token."""


def linear_probe(evaluated: EvaluatedRows, training: Batch, seed: int) -> dict[str, list[float]]:
    """Names the token at P - j for j = 0..T-1: by a probe of the activation, and by the lens's words.

    A text names a token if it holds it anywhere. Tokens that no training row ends in are beyond the probe and count as
    not named; rows whose context does not reach back so far are left out.

    Args:
        evaluated: the held-out rows with the lens's texts.
        training: `activations`, `tail_ids` and `tail_mask` of the rows that the probe is fitted to.
        seed: of the pairing with texts of other documents.

    Returns:
        Lists of T, from j = 0:

        - `probe_accuracy`: the share of held-out rows whose token the probe names.
        - `named_by_text`: the share whose token is in the lens's text.
        - `named_by_shuffled_text`: the same for the text of a row of another document, which is chance.
        - `rows`: the number of rows; where it is 0, so are the shares.

    Raises:
        ValueError: if all held-out rows are of one document.
    """
    features, train_features = standardised(evaluated.column("activations"), training["activations"])
    tails, masks = evaluated.column("tail_ids"), evaluated.column("tail_mask")
    texts = evaluated.text_ids.masked_fill(~evaluated.text_mask, -1)
    partners = rows_of_other_documents(evaluated.column("document"), torch.Generator().manual_seed(seed))
    results: dict[str, list[float]] = {
        name: [] for name in ("probe_accuracy", "named_by_text", "named_by_shuffled_text", "rows")
    }
    for column in reversed(range(tails.shape[1])):
        there, tokens = masks[:, column], tails[:, column]
        known = training["tail_mask"][:, column]
        predicted = probed_tokens(train_features[known], training["tail_ids"][known, column], features)
        named = {
            "probe_accuracy": predicted == tokens,
            "named_by_text": (texts == tokens[:, None]).any(dim=1),
            "named_by_shuffled_text": (texts[partners] == tokens[:, None]).any(dim=1),
        }
        count = int(there.sum())
        for name, hits in named.items():
            results[name].append(int(hits[there].sum()) / max(1, count))
        results["rows"].append(count)
    return results


def standardised(activations: Tensor, train_activations: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (N, d) and (n, d) in float64 on the CPU, each dimension centred and scaled as in the second."""
    train = train_activations.cpu().double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1)
    return (activations.cpu().double() - mean) / scale, (train - mean) / scale


def probed_tokens(train_features: Tensor, train_tokens: Tensor, features: Tensor) -> Tensor:
    """The tokens (N,) that a probe fitted to (n, d) and (n,) names for (N, d); -1 where there is nothing to fit to.

    How far the tokens' means are shrunk is chosen on the last fifth of the training rows.
    """
    if len(train_tokens) == 0:
        return torch.full((len(features),), -1)
    fitted = -(-4 * len(train_tokens) // 5)
    part = token_classes(train_features[:fitted], train_tokens[:fitted])
    left = train_features[fitted:]
    hits = [(likeliest_tokens(part, left, s) == train_tokens[fitted:]).sum() for s in SHRINKAGES]
    best = SHRINKAGES[int(torch.stack(hits).argmax())]
    return likeliest_tokens(token_classes(train_features, train_tokens), features, best)


def token_classes(features: Tensor, tokens: Tensor) -> TokenClasses:
    """What the rows (n, d) of each of the tokens (n,) have in common."""
    seen, group, counts = tokens.unique(return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(seen), features.shape[1]).index_add_(0, group, features)
    scatter = features - (sums / counts[:, None])[group]
    covariance = scatter.T @ scatter / max(1, len(tokens) - len(seen))
    covariance.diagonal().add_(RIDGE)
    return TokenClasses(seen, counts, sums, torch.linalg.cholesky(covariance))


def likeliest_tokens(classes: TokenClasses, features: Tensor, shrinkage: float) -> Tensor:
    """The likeliest token of each row (N, d), (N,): normal classes of one covariance, as frequent as in training."""
    means = classes.sums / (classes.counts + shrinkage)[:, None]
    weight = torch.cholesky_solve(means.T, classes.factor)
    bias = classes.counts.double().log() - (means.T * weight).sum(dim=0) / 2
    best = [torch.addmm(bias, rows, weight).argmax(dim=1) for rows in features.split(CHUNK_ROWS)]
    return classes.tokens[torch.cat(best)]
