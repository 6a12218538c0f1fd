"""KL(P_final || P_layer) of many layers at once, without a (rows, V) tensor and without reading the teacher twice.

With z(x) = W x + b, p the teacher's distribution, e = E_p[W] = W^T p and m = E_p[b], the cross-entropy of a layer's
logits z(x) / tau needs only the numbers e and m of the teacher, computed once for all layers:

    KL = (x_L . e + m - lse_L) - ((x . e + m) / tau - lse)
    dKL/dx = (W^T softmax(z / tau) - e) / tau
    dKL/dtau = ((x . e + m) - E_q[z]) / tau^2, with q = softmax(z / tau)

lse and E_q[W] are summed over chunks of the vocabulary in one pass, rescaled to the largest logit so far; E_q[z] is
x . E_q[W] + E_q[b]. With a soft-cap, s = c tanh(z / c), the logits are not linear in x, so the teacher's probabilities
are read chunk by chunk.
Shapes: N rows, R layers times rows, d width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# numbers in one chunk of logits: 64 MiB in float32 on a GPU, and on a CPU 4 MiB, which stay in its cache
CHUNK_NUMBERS = 1 << 24
CPU_CHUNK_NUMBERS = 1 << 20


class Head(NamedTuple):
    """What turns a normalised residual into logits: c tanh((W x + b) / c), or W x + b without a soft-cap."""

    weight: Tensor
    """W (V, d), in the precision in which it is multiplied."""
    bias: Tensor | None
    """(V,) float32."""
    soft_cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits of normalised residuals (N, d), (N, V) float32."""
        return _capped(_raw_logits(hidden, self), self.soft_cap)[0]

    def rows(self, ids: Tensor) -> "Head":
        """The head of some tokens alone, (K,) int64."""
        return Head(self.weight[ids], None if self.bias is None else self.bias[ids], self.soft_cap)


class Teacher(NamedTuple):
    """The final distribution p of N rows, as far as the KL asks for it; all float32."""

    hidden: Tensor
    """x_L (N, d), the normalised final residual."""
    lse: Tensor
    """(N,), log of the sum of exp of its logits."""
    expected_weight: Tensor
    """e = E_p[W], (N, d)."""
    expected_logit: Tensor
    """E_p of the logits, (N,)."""

    @property
    def negative_entropy(self) -> Tensor:
        """E_p[log p] in nats, (N,)."""
        return self.expected_logit - self.lse


@torch.no_grad()
def read_teacher(hidden: Tensor, head: Head, chunk_numbers: int | None = None) -> Teacher:
    """What the KL needs of the final distribution, in one pass over the vocabulary.

    Args:
        hidden: (N, d) float32, the normalised final residuals.
        chunk_numbers: see `streamed_kl`.
    """
    sums = _Sums(hidden, head)
    for chunk in _chunks(head, len(hidden), chunk_numbers):
        logits, _ = _capped(_raw_logits(hidden, chunk), head.soft_cap)
        sums.add(logits, None, chunk)
    return Teacher(hidden, sums.lse, sums.expected_weight, sums.expected_logit(hidden))


def streamed_kl(
    hidden: Tensor, temperature: Tensor, teacher: Teacher, head: Head, chunk_numbers: int | None = None
) -> Tensor:
    """KL(P_final || P_layer) in nats, (layers, N) float32; gradients reach `hidden` and `temperature`.

    Args:
        hidden: (layers, N, d) float32, translated residuals.
        temperature: (layers,) float32.
        teacher: of the same N rows, read with the same head.
        head: of the subject.
        chunk_numbers: of logits that are held at a time; None for what suits the device.
    """
    return _StreamedKL.apply(hidden, temperature, teacher, head, chunk_numbers)


@torch.no_grad()
def mean_probabilities(teacher: Teacher, head: Head, chunk_numbers: int | None = None) -> Tensor:
    """The mean of the final distribution over the rows, (V,) float32."""
    found = []
    for chunk in _chunks(head, len(teacher.hidden), chunk_numbers):
        logits, _ = _capped(_raw_logits(teacher.hidden, chunk), head.soft_cap)
        found.append((logits - teacher.lse[:, None]).exp().mean(dim=0))
    return torch.cat(found)


def top_tokens(teacher: Teacher, head: Head, count: int) -> Tensor:
    """The union over rows of the teacher's `count` most probable tokens, (K,) int64 ascending.

    Training on those alone, with both distributions renormalised over them, spares most of a large vocabulary.
    """
    found = []
    step = max(1, CHUNK_NUMBERS // len(head.weight))
    for rows in teacher.hidden.split(step):
        found.append(_raw_logits(rows, head).topk(min(count, len(head.weight)), dim=-1).indices.unique())
    return torch.cat(found).unique()


class _StreamedKL(torch.autograd.Function):
    """The gradient is computed with the loss, while a chunk of logits is at hand, and kept: it is as large as x."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, temperature: Tensor, teacher: Teacher, head: Head, chunk_numbers: int | None
    ) -> Tensor:
        layers, num_rows, width = hidden.shape
        wanted = any(ctx.needs_input_grad)
        rows, tau = hidden.reshape(-1, width), temperature.repeat_interleave(num_rows)[:, None]
        one = _soft_capped_kl if head.soft_cap is not None else _linear_kl
        kl, gradient, slope = one(rows, tau, layers, teacher, head, chunk_numbers, wanted)
        if wanted:
            ctx.save_for_backward(gradient.view_as(hidden), slope.view(layers, num_rows))
        return kl.view(layers, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, slope = ctx.saved_tensors
        return gradient * grad[..., None], (slope * grad).sum(dim=1), None, None, None


def _linear_kl(
    rows: Tensor, tau: Tensor, layers: int, teacher: Teacher, head: Head, chunk_numbers: int | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (R,), its gradient (R, d) and its slope in the temperature (R,), for a head without soft-cap."""
    sums, cooled = _Sums(rows, head, wanted), rows / tau  # W x / tau is W (x / tau), and x is far smaller
    for chunk in _chunks(head, len(rows), chunk_numbers):
        sums.add(_raw_logits(cooled, chunk, tau), None, chunk)
    tau = tau[:, 0]
    e = teacher.expected_weight.repeat(layers, 1)
    expected = (rows * e).sum(dim=-1)
    if head.bias is not None:  # E_p[b]: what the teacher's expected logit has beside x_L . e
        beside = teacher.expected_logit - (teacher.hidden * teacher.expected_weight).sum(dim=-1)
        expected = expected + beside.repeat(layers)
    kl = teacher.negative_entropy.repeat(layers) - expected / tau + sums.lse
    if not wanted:
        return kl, rows, tau
    slope = (expected - sums.expected_logit(rows)) / tau.square()
    return kl, (sums.expected_weight - e) / tau[:, None], slope


def _soft_capped_kl(
    rows: Tensor, tau: Tensor, layers: int, teacher: Teacher, head: Head, chunk_numbers: int | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a soft-cap; the teacher's probabilities are read again, a chunk at a time."""
    sums, expected, from_teacher = _Sums(rows, head, wanted), torch.zeros_like(tau[:, 0]), torch.zeros_like(rows)
    for chunk in _chunks(head, len(rows), chunk_numbers):
        logits, slope = _capped(_raw_logits(rows, chunk), head.soft_cap)
        sums.add(logits / tau, slope, chunk)
        final, _ = _capped(_raw_logits(teacher.hidden, chunk), head.soft_cap)
        p = (final - teacher.lse[:, None]).exp().repeat(layers, 1)
        expected += (p * logits).sum(dim=-1)
        if wanted:
            from_teacher += _times_weight(p.mul_(slope), chunk)
    tau = tau[:, 0]
    kl = teacher.negative_entropy.repeat(layers) - expected / tau + sums.lse
    gradient = (sums.expected_weight - from_teacher) / tau[:, None]
    return kl, gradient, expected / tau.square() - sums.expected_logit(rows) / tau


class _Sums:
    """Running sums over the vocabulary under q = softmax(logits): lse, E_q[slope W], E_q[b] and E_q[logits].

    Without a soft-cap, E_q of the logits x . W + b follows from the others, and is not summed up.
    """

    def __init__(self, rows: Tensor, head: Head, gradient: bool = True) -> None:
        self.largest = rows.new_full((len(rows), 1), float("-inf"))
        self.total = rows.new_zeros(len(rows), 1)
        self.weighted = torch.zeros_like(rows) if gradient else None
        self.capped = head.soft_cap is not None
        # of the logits with a soft-cap, of the bias without
        self.weighted_number = rows.new_zeros(len(rows), 1)

    def add(self, logits: Tensor, slope: Tensor | None, head: Head) -> None:
        """Takes a chunk's logits (R, v), and their slope in what the head's matrix gave where it is not 1.

        Without a soft-cap the logits are overwritten.
        """
        largest = torch.maximum(self.largest, logits.amax(dim=-1, keepdim=True))
        rescale = (self.largest - largest).exp()
        weights = (logits - largest if self.capped else logits.sub_(largest)).exp_()
        self.total = self.total * rescale + weights.sum(dim=-1, keepdim=True)
        self.largest = largest
        if self.weighted is None:
            return
        if self.capped:
            self.weighted_number = self.weighted_number * rescale + (weights * logits).sum(dim=-1, keepdim=True)
        elif head.bias is not None:
            self.weighted_number = self.weighted_number * rescale + weights @ head.bias[:, None]
        weights = weights if slope is None else weights.mul_(slope)
        self.weighted = self.weighted.mul_(rescale).add_(_times_weight(weights, head))

    @property
    def lse(self) -> Tensor:
        return (self.largest + self.total.log())[:, 0]

    @property
    def expected_weight(self) -> Tensor:
        return self.total if self.weighted is None else self.weighted / self.total

    def expected_logit(self, rows: Tensor) -> Tensor:
        """Of the logits that were taken with a soft-cap; without, of W x + b for these rows (R, d)."""
        number = (self.weighted_number / self.total)[:, 0]
        return number if self.capped else (rows * self.expected_weight).sum(dim=-1) + number


def _chunks(head: Head, num_rows: int, chunk_numbers: int | None) -> list[Head]:
    """The head in pieces of the vocabulary, each with at most `chunk_numbers` logits of all rows."""
    if chunk_numbers is None:
        chunk_numbers = CPU_CHUNK_NUMBERS if head.weight.device.type == "cpu" else CHUNK_NUMBERS
    size = max(1, chunk_numbers // max(1, num_rows))
    biases: Any = [None] * -(-len(head.weight) // size) if head.bias is None else head.bias.split(size)
    return [Head(weight, bias) for weight, bias in zip(head.weight.split(size), biases, strict=True)]


def _raw_logits(rows: Tensor, head: Head, tau: Tensor | None = None) -> Tensor:
    """W x + b, (R, v) float32; or W x + b / tau, with tau (R, 1), for rows that are divided by it already."""
    logits = linear(rows.to(head.weight.dtype), head.weight).float()
    if head.bias is None:
        return logits
    return logits.add_(head.bias if tau is None else head.bias / tau)


def _times_weight(weights: Tensor, head: Head) -> Tensor:
    """(R, v) times W, (R, d) float32."""
    return (weights.to(head.weight.dtype) @ head.weight).float()


def _capped(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """Soft-capped logits, and their slope in the ones that come in."""
    if soft_cap is None:
        return logits, torch.ones(())
    bent = torch.tanh(logits / soft_cap)
    return soft_cap * bent, 1 - bent.square()
