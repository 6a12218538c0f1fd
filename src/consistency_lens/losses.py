"""Losses: pure functions, tensors in, one number a row out; arithmetic in float32 or wider, logarithms natural.

The losses over the vocabulary walk through the rows in chunks and recompute the softmax in the backward pass, so a
float32 copy of (B, T, V) logits never exists as a whole: what is held is the logits themselves and their gradient, in
the dtype they came in.

Shapes: B batch, T text tokens, V vocabulary, d width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .straight_through import row_chunks

ADVANTAGE_EPS = 1e-4  # in units of the reward


def kl_divergence(p_logits: Tensor, q_logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), in nats, of two next-token distributions.

    Gradients reach both sides where they are asked for: `softmax(q) - p` for q, `p * (log p - log q - KL)` for p.

    Args:
        p_logits: (..., V) logits of the reference; tokens at -inf have probability 0 and add nothing.
        q_logits: (..., V) logits of the approximation. A token at -inf that p gives weight makes the KL infinite.
        chunk_size: rows worked on at a time.

    Returns:
        (...) float32, or float64 for such inputs.

    Raises:
        ValueError: if the shapes differ.
    """
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            f"kl_divergence needs logits of one shape, got {tuple(p_logits.shape)} and {tuple(q_logits.shape)}; "
            "compare the same positions and vocabulary"
        )
    vocab_size = p_logits.shape[-1]
    rows = _RowLoss.apply(_KL, chunk_size, p_logits.reshape(-1, vocab_size), q_logits.reshape(-1, vocab_size))
    return rows.view(p_logits.shape[:-1])


def k3_divergence(p_log_probability: Tensor, q_log_probability: Tensor) -> Tensor:
    """An estimate of KL(p || q), in nats, from tokens drawn from p: q/p - 1 - log(q/p).

    Never negative, and right in the mean (Schulman 2020, "Approximating KL divergence", there k3). It needs the
    probability of one token in place of a whole distribution. As a loss it is not KL(p || q): over the draws of p, its
    gradient is that of KL(q || p).

    Args:
        p_log_probability: (...) log p of the drawn tokens.
        q_log_probability: (...) log q of the same tokens.
    """
    gap = q_log_probability - p_log_probability
    return gap.exp() - 1 - gap


def entropy(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """H = -sum_v p_v log p_v, in nats, with p = softmax(logits); its gradient is `-p * (log p + H)`.

    Args:
        logits: (..., V); tokens at -inf add nothing.
        chunk_size: rows worked on at a time.

    Returns:
        (...) float32, or float64 for such inputs.
    """
    return _RowLoss.apply(_ENTROPY, chunk_size, logits.reshape(-1, logits.shape[-1])).view(logits.shape[:-1])


def token_log_probabilities(logits: Tensor, ids: Tensor, chunk_size: int | None = None) -> Tensor:
    """log softmax(logits)[id], in nats, of every token.

    Args:
        logits: (B, T, V), the prediction *of* each token: position t of the logits belongs to position t of `ids`.
        ids: (B, T) int64.
        chunk_size: tokens worked on at a time.

    Returns:
        (B, T) float32, or float64 for such inputs.

    Raises:
        ValueError: if the shapes do not agree.
    """
    if ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"token losses need ids and mask of shape {tuple(logits.shape[:-1])}, got {tuple(ids.shape)}; "
            "drop the prompt's positions from the logits first"
        )
    losses = _RowLoss.apply(_CROSS_ENTROPY, chunk_size, logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, 1))
    return -losses.view(ids.shape)


def token_cross_entropy(
    logits: Tensor, ids: Tensor, mask: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """-log softmax(logits)[id], in nats a token, averaged over the tokens of each text.

    Args:
        logits: (B, T, V), as in `token_log_probabilities`.
        ids: (B, T) int64; what stands at masked positions does not matter.
        mask: (B, T), true at the tokens that count; None for all.
        chunk_size: tokens worked on at a time.

    Returns:
        (B,) float32, or float64 for such inputs; 0 for a text without tokens that count.

    Raises:
        ValueError: if the shapes do not agree.
    """
    if mask is None:
        return -token_log_probabilities(logits, ids, chunk_size).mean(dim=1)
    if mask.shape != ids.shape:
        raise ValueError(
            f"token losses need ids and mask of shape {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}; "
            "mask the tokens of `ids`"
        )
    keep = mask.bool()
    losses = -token_log_probabilities(logits, ids.masked_fill(~keep, 0), chunk_size)
    return masked_mean(losses, keep)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the T tokens of each row of values (B, T) where the mask (B, T) is true: (B,), 0 without any."""
    return values.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def normalised_mse(target: Tensor, prediction: Tensor, rms: float | Tensor) -> Tensor:
    """The mean over d of ((target - prediction) / rms)^2, without unit: 1 is the error of a typical activation's size.

    Args:
        target: (B, d).
        prediction: (B, d).
        rms: the root mean square of the training cache's centred activations, as the lens stores it.

    Returns:
        (B,) float32, or float64 for such inputs.
    """
    dtype = _wide_dtype(target, prediction)
    return ((target.to(dtype) - prediction.to(dtype)) / rms).square().mean(dim=-1)


def group_advantage(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """(r - mean) / (std + eps) within each group of consecutive rewards (B * G,); 0 where all are equal.

    Without `scale` the rewards are only centred: then the gradient is, in the mean, (G - 1) / G of that of the
    expected reward (Liu et al. 2025, arXiv:2503.20783, on what the division does).
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + ADVANTAGE_EPS) if scale else centred).flatten()


def functional_target(reconstruction: Tensor, other: Tensor, other_reconstruction: Tensor, detach: bool) -> Tensor:
    """`Â + (A' - Â')`: the reconstruction, with what the lens lost of a second activation added (`delta_residual`).

    Args:
        reconstruction: (B, d), Â.
        other: (B, d), A', activations of other documents.
        other_reconstruction: (B, d), Â'.
        detach: whether the second term is a constant, so that the KL trains the reconstruction of A alone.

    Returns:
        (B, d), the activation to put in A's place.
    """
    delta = other - other_reconstruction
    return reconstruction + (delta.detach() if detach else delta)


class _Formula(NamedTuple):
    """A loss of rows and its gradients, written for a chunk of rows that are already float32 or wider."""

    value: Callable[..., Tensor]  # rows -> (n,)
    # grad (n, 1), which inputs need a gradient, rows -> a gradient for each input
    gradients: Callable[..., tuple[Tensor | None, ...]]


class _RowLoss(torch.autograd.Function):
    """Applies a formula chunk by chunk; the backward pass goes through them again and fills the gradients."""

    @staticmethod
    def forward(ctx: Any, formula: _Formula, chunk_size: int | None, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.formula, ctx.chunk_size = formula, chunk_size
        losses = torch.empty(len(inputs[0]), dtype=_wide_dtype(*inputs), device=inputs[0].device)
        for rows in row_chunks(inputs[0], chunk_size):
            losses[rows] = formula.value(*(_wide(tensor[rows]) for tensor in inputs))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        results = [torch.empty_like(tensor) if need else None for tensor, need in zip(inputs, needed, strict=True)]
        for rows in row_chunks(inputs[0], ctx.chunk_size):
            chunk = (_wide(tensor[rows]) for tensor in inputs)
            for result, part in zip(results, ctx.formula.gradients(grad[rows, None], needed, *chunk), strict=True):
                if result is not None:
                    result[rows] = part
        return None, None, *results


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor)) if tensor.is_floating_point() else tensor


def _log_probability_gap(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = p_logits.log_softmax(dim=-1)
    p = log_p.exp()
    # where p is 0 the gap may be -inf - -inf; such tokens count nothing
    return p, log_p.sub_(q_logits.log_softmax(dim=-1)).masked_fill_(p == 0, 0)


def _kl_value(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, gap = _log_probability_gap(p_logits, q_logits)
    return gap.mul_(p).sum(dim=-1)


def _kl_gradients(
    grad: Tensor, needed: tuple[bool, bool], p_logits: Tensor, q_logits: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    grad_p = None
    if needed[0]:
        p, gap = _log_probability_gap(p_logits, q_logits)
        kl = (p * gap).sum(dim=-1, keepdim=True)
        grad_p = gap.sub_(kl).mul_(p).mul_(grad)
    grad_q = q_logits.softmax(dim=-1).sub_(p_logits.softmax(dim=-1)).mul_(grad) if needed[1] else None
    return grad_p, grad_q


def _entropy_value(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    return -log_p.masked_fill_(p == 0, 0).mul_(p).sum(dim=-1)


def _entropy_gradients(grad: Tensor, needed: tuple[bool], logits: Tensor) -> tuple[Tensor]:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    log_p.masked_fill_(p == 0, 0)
    negative_entropy = (log_p * p).sum(dim=-1, keepdim=True)
    return (log_p.sub_(negative_entropy).mul_(p).mul_(-grad),)


def _cross_entropy_value(logits: Tensor, ids: Tensor) -> Tensor:
    return (logits.logsumexp(dim=-1, keepdim=True) - logits.gather(1, ids)).squeeze(1)


def _cross_entropy_gradients(
    grad: Tensor, needed: tuple[bool, bool], logits: Tensor, ids: Tensor
) -> tuple[Tensor, None]:
    return logits.softmax(dim=-1).scatter_add_(1, ids, logits.new_full(ids.shape, -1.0)).mul_(grad), None


_KL = _Formula(_kl_value, _kl_gradients)
_ENTROPY = _Formula(_entropy_value, _entropy_gradients)
_CROSS_ENTROPY = _Formula(_cross_entropy_value, _cross_entropy_gradients)
