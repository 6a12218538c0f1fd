"""Losses: pure functions, tensors in, one number a row out; arithmetic in float32 or wider, logarithms natural.

The losses over the vocabulary walk through the rows in chunks, and make the gradient along with the loss, while the
softmax is at hand. A float32 copy of (B, T, V) logits never exists as a whole: what is held of the logits is their
gradient, in the dtype they came in.

Shapes: B batch, T text tokens, V vocabulary, d width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plain_arithmetic import is_plain
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
    rows = _row_losses(_kl, chunk_size, p_logits.reshape(-1, vocab_size), q_logits.reshape(-1, vocab_size))
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
    return _row_losses(_entropy, chunk_size, logits.reshape(-1, logits.shape[-1])).view(logits.shape[:-1])


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
    losses = _row_losses(_cross_entropy, chunk_size, logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, 1))
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


# for each input, room for the gradient of the sum of the losses, or None; chunks of rows that are already float32 or
# wider -> losses (n,)
Formula = Callable[..., Tensor]
Rooms = Sequence[Tensor | None]


class _RowLoss(torch.autograd.Function):
    """Applies a formula chunk by chunk, which makes losses and gradients in one go, of one softmax.

    What waits for the backward pass is the gradient, in the dtype of the logits, and not the logits.
    """

    @staticmethod
    def forward(ctx: Any, formula: Formula, chunk_size: int | None, has_backward: bool, *inputs: Tensor) -> Tensor:
        needed = tuple(has_backward and needs for needs in ctx.needs_input_grad[3:])
        losses = torch.empty(len(inputs[0]), dtype=_wide_dtype(*inputs), device=inputs[0].device)
        gradients = [torch.empty_like(tensor) if needs else None for tensor, needs in zip(inputs, needed, strict=True)]
        for rows in row_chunks(inputs[0], chunk_size):
            rooms = [None if gradient is None else gradient[rows] for gradient in gradients]
            losses[rows] = formula(rooms, *(_wide(tensor[rows]) for tensor in inputs))
        ctx.save_for_backward(*gradients)
        ctx.chunk_size = chunk_size
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, size = ctx.saved_tensors, ctx.chunk_size
        weighted = [None if gradient is None else _weighted_rows(gradient, grad, size) for gradient in gradients]
        return None, None, None, *weighted


def _weighted_rows(matrix: Tensor, weights: Tensor, chunk_size: int | None) -> Tensor:
    """The rows of a matrix (N, V) times one weight (N,) each, rounded to the dtype of the matrix once."""
    weighted = torch.empty_like(matrix)
    for rows in row_chunks(matrix, chunk_size):
        torch.mul(matrix[rows], weights[rows, None], out=weighted[rows])
    return weighted


def _row_losses(formula: Formula, chunk_size: int | None, *inputs: Tensor) -> Tensor:
    """The losses (N,) of all rows of inputs (N, ...)."""
    if is_plain():
        return PLAIN[formula](*(_wide(tensor) for tensor in inputs))
    return _RowLoss.apply(formula, chunk_size, torch.is_grad_enabled(), *inputs)


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor)) if tensor.is_floating_point() else tensor


def _weighted_(values: Tensor, p: Tensor) -> Tensor:
    """`values * p`, in place of the values; 0 where p is 0 and the value infinite or not a number."""
    return values.mul_(p).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _kl(rooms: Rooms, p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    p = log_p.exp()
    terms = _weighted_(log_p.sub_(log_q), p)
    # a row with a logit that is not a number has no probability that is one
    kl = terms.sum(dim=-1, keepdim=True) + 0 * (p[:, :1] + log_q[:, :1].exp())
    if rooms[0] is not None:
        torch.addcmul(terms, p, kl, value=-1, out=rooms[0])
    if rooms[1] is not None:
        torch.sub(log_q.exp_(), p, out=rooms[1])
    return kl.squeeze(1)


def _entropy(rooms: Rooms, logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    terms = _weighted_(log_p, p)
    negative = terms.sum(dim=-1, keepdim=True) + 0 * p[:, :1]
    if rooms[0] is not None:
        torch.sub(p * negative, terms, out=rooms[0])
    return -negative.squeeze(1)


def _cross_entropy(rooms: Rooms, logits: Tensor, ids: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=-1)
    losses = -log_p.gather(1, ids).squeeze(1)
    if rooms[0] is not None:
        rooms[0].copy_(log_p.exp_().scatter_add_(1, ids, logits.new_full(ids.shape, -1.0)))
    return losses


def _plain_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    p = log_p.exp()
    nothing = p == 0
    return (p * (log_p.masked_fill(nothing, 0) - log_q.masked_fill(nothing, 0))).sum(dim=-1)


def _plain_entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(dim=-1)


def _plain_cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return -logits.log_softmax(dim=-1).gather(1, ids).squeeze(1)


PLAIN: dict[Formula, Callable[..., Tensor]] = {
    _kl: _plain_kl,
    _entropy: _plain_entropy,
    _cross_entropy: _plain_cross_entropy,
}
