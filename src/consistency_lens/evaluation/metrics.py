"""Metrics: pure functions of tensors, computed in float64, and their intervals by bootstrap over documents.

FVE, KL recovered and perplexity are functions of sums over rows. So a resample of documents needs only the sums of
each document, and a thousand resamples are one matrix product.

Shapes: N rows, T text tokens, d width, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedConfig

from ..losses import token_cross_entropy
from ..subject import Subject

# Counts held at a time: resamples x documents.
BOOTSTRAP_BLOCK = 1 << 22


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """|A - Â|² of each row, (N,) float64, from (N, d) and (N, d) or (d,)."""
    return (target.double() - prediction.double()).square().sum(dim=-1)


def share_recovered(loss: Tensor, baseline: Tensor) -> Tensor:
    """1 - loss / baseline, of sums: 1 is perfect, 0 no better than the baseline, negative worse."""
    return 1 - loss / baseline


def fve(target: Tensor, prediction: Tensor, mean: Tensor) -> Tensor:
    """Fraction of variance explained, 1 - sum |A - Â|² / sum |A - mu|², sums over all rows and dimensions.

    Args:
        target: A, (N, d).
        prediction: Â, (N, d).
        mean: mu, (d,), the mean activation of the training rows, not of these.

    Returns:
        A scalar, float64: 1 for the identity, 0 for the mean.
    """
    return share_recovered(squared_error(target, prediction).sum(), squared_error(target, mean).sum())


def unit_norm_errors(target: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums' rows of `fve_nrm`: |a - â|² and |a - mu|², (N,) float64 each, mu the mean of the rows a."""
    target, prediction = normalize(target.double(), dim=-1), normalize(prediction.double(), dim=-1)
    return squared_error(target, prediction), squared_error(target, target.mean(dim=0))


def fve_nrm(target: Tensor, prediction: Tensor) -> Tensor:
    """FVE of directions: a = A/|A| and â = Â/|Â| in place of A and Â, mu the mean of the rows a, not re-normalised.

    Args:
        target: A, (N, d).
        prediction: Â, (N, d).

    Returns:
        A scalar, float64.
    """
    error, variance = unit_norm_errors(target, prediction)
    return share_recovered(error.sum(), variance.sum())


def cosine(target: Tensor, prediction: Tensor) -> Tensor:
    """The mean over rows of cos(A, Â), a scalar in float64; nothing is centred."""
    return torch.cosine_similarity(target.double(), prediction.double(), dim=-1).mean()


def kl_recovered(kl: Tensor, kl_mean: Tensor) -> Tensor:
    """1 - sum KL(Â) / sum KL(mu), from (N,) nats each: 1 is perfect, 0 no better than the mean activation."""
    return share_recovered(kl.double().sum(), kl_mean.double().sum())


def top1_agreement(logits: Tensor, replaced_logits: Tensor) -> Tensor:
    """The share of rows (N, V) whose likeliest token is the same, a scalar in float64."""
    return (logits.argmax(dim=-1) == replaced_logits.argmax(dim=-1)).double().mean()


def perplexity(nll: Tensor, mask: Tensor | None = None) -> Tensor:
    """exp of the mean negative log-likelihood of all tokens (N, T), in nats, where `mask` (N, T) is true."""
    nll = nll.double()
    return nll.mean().exp() if mask is None else nll[mask.bool()].mean().exp()


def distinct_n(ids: Tensor, n: int, mask: Tensor | None = None) -> float:
    """Distinct n-grams / n-grams over all texts (N, T) together (Li et al. 2016); 1 where texts are shorter than n.

    It falls as N grows: compare only texts of one number and length.

    Args:
        ids: (N, T) int64.
        n: tokens in an n-gram.
        mask: (N, T), true at the tokens of a text. None for all.
    """
    if ids.shape[1] < n:
        return 1.0
    grams = ids.unfold(1, n, 1).flatten(0, 1)
    if mask is not None:
        grams = grams[mask.unfold(1, n, 1).flatten(0, 1).all(dim=1)]
    return len(grams.unique(dim=0)) / len(grams) if len(grams) else 1.0


def unused_token_share(ids: Tensor, vocabulary: Tensor, mask: Tensor | None = None) -> float:
    """The share of a vocabulary that no text uses.

    It falls as N grows, and N texts of T tokens cannot use more than N T tokens: it says something of a lens only
    beside the same number for as much true text.

    Args:
        ids: (N, T) int64.
        vocabulary: (n,) token ids, each once.
        mask: (N, T), true at the tokens of a text. None for all.
    """
    used = ids if mask is None else ids[mask.bool()]
    return 1 - float(torch.isin(vocabulary, used).double().mean())


def first_kept(mask: Tensor, count: int | Tensor) -> Tensor:
    """Of the tokens (N, T) that a mask keeps, the first `count`, which may be (N, 1)."""
    return mask & (mask.cumsum(dim=1) <= count)


def last_kept(mask: Tensor, count: int | Tensor) -> Tensor:
    """Of the tokens (N, T) that a mask keeps, the last `count`, which may be (N, 1)."""
    return mask & (mask.flip(1).cumsum(dim=1).flip(1) <= count)


@torch.no_grad()
def text_nll(subject: Subject, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log p(token | BOS, the text before it) under the subject, in nats.

    Args:
        subject: the model that scores; without a BOS it reads EOS first.
        ids: (N, T) int64.
        mask: (N, T), true at the tokens of a text; the others are left out of the context too. None for all.

    Returns:
        (N, T) float32, 0 where `mask` is false.

    Raises:
        ValueError: if the subject's configuration has neither BOS nor EOS.
    """
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # Padding goes to the right end: there it needs no attention mask and shifts no absolute position.
    order = keep.int().argsort(dim=1, descending=True, stable=True)
    packed = ids.gather(1, order)
    start = torch.full_like(ids[:, :1], start_token(subject.model.config.get_text_config()))
    logits = subject.run(True, input_ids=torch.cat([start, packed[:, :-1]], dim=1), use_cache=False)
    nll = token_cross_entropy(logits.flatten(0, 1)[:, None], packed.reshape(-1, 1)).view(ids.shape)
    return torch.zeros_like(nll).scatter(1, order, nll).masked_fill(~keep, 0)


def start_token(config: PreTrainedConfig) -> int:
    """The token that a text on its own is read after: BOS, or EOS where the model has none.

    Raises:
        ValueError: if the model has neither.
    """
    token = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if token is None:
        raise ValueError(
            "text_nll: the subject's config has neither bos_token_id nor eos_token_id (both are None); set one of them"
        )
    return token[0] if isinstance(token, list) else token


def bootstrap_sums(
    columns: Mapping[str, Tensor], documents: Tensor, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Tensor]:
    """Sums of columns over resampled documents: each resample draws as many documents as there are, with replacement.

    Args:
        columns: name -> one number a row, (N,).
        documents: (N,) int64, the document of each row. Rows of one document are drawn together, as they are not
            independent.
        num_resamples: R.
        seed: of the draws.

    Returns:
        name -> (R,) float64.
    """
    _, group = documents.unique(return_inverse=True)
    rows = torch.stack([column.double() for column in columns.values()], dim=1)
    count = int(group.max()) + 1
    per_document = rows.new_zeros(count, rows.shape[1]).index_add_(0, group, rows)
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    step = max(1, BOOTSTRAP_BLOCK // count)
    for start in range(0, num_resamples, step):
        drawn = torch.randint(count, (min(step, num_resamples - start), count), generator=generator)
        times = rows.new_zeros(drawn.shape).scatter_add_(1, drawn, rows.new_ones(1, 1).expand(drawn.shape))
        blocks.append(times @ per_document)
    return dict(zip(columns, torch.cat(blocks).unbind(dim=1), strict=True))


def bootstrap_interval(
    statistic: Callable[[Mapping[str, Tensor]], Tensor],
    columns: Mapping[str, Tensor],
    documents: Tensor,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic by bootstrap over documents (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistic: sums (name -> (R,)) -> (R,), the metric as a function of column sums; for FVE
            `lambda s: 1 - s["error"] / s["variance"]`.
        columns: name -> one number a row, (N,).
        documents: (N,) int64.
        num_resamples: R.
        level: the share of resamples inside.
        seed: of the draws.

    Returns:
        (low, high); of no width where all rows are of one document.
    """
    return percentile_interval(statistic(bootstrap_sums(columns, documents, num_resamples, seed)), level)


def percentile_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of values (R,)."""
    low, high = values.quantile(values.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
    return low, high
