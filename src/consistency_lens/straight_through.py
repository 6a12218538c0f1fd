"""The straight-through Gumbel embedding: sample a token, embed it, and let gradients pass as if it were soft.

The forward pass takes the Gumbel-max sample of a row of logits and gathers one row of the embedding table; the
backward pass is that of `(hard - soft.detach() + soft) @ table` with `soft = softmax((logits + g) / tau)` (Jang et al.
2017, arXiv:1611.01144, section 2.2), with `soft` recomputed a few rows at a time, so that no one-hot or probability
tensor of shape (N, V) is ever stored. That asks for noise that can be made twice: `g` is a function of a row's key
and the vocabulary index, never of a generator's state, so a row draws the same tokens in any batch, on any process.

Shapes: B batch, N rows, V vocabulary, d width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plain_arithmetic import is_plain
from .summed_gradient import SummedGradient
from .table_product import table_product

# Elements of a (rows, V) chunk: on a CPU 1 MiB of float32, so that what a formula makes of it stays in the cache and
# every operation is worth its call; elsewhere 64 MiB, for a smaller one would be read and written in less time than
# its kernel takes to start.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_ON_CPU = 2**24, 2**18

_GOLDEN_RATIO = -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as a signed word
_MASK_31 = 0x7FFFFFFF
_ODD_31 = 0x46CA68B1
# Maps the integers 0.5 .. 2^31 into the open interval (0, 1): the greatest becomes the greatest float32 below one.
_TO_UNIT = 2.0**-31 * (1 - 2.0**-24)


def row_chunks(matrix: Tensor, chunk_size: int | None = None) -> Iterator[slice]:
    """Slices that cut the rows of a matrix into chunks of `chunk_size` rows, by default as large as suits its device.

    Raises:
        ValueError: if `chunk_size` is below one.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}; leave it out for the default")
    num_rows, row_elements = matrix.shape
    elements = CHUNK_ELEMENTS_ON_CPU if matrix.device.type == "cpu" else CHUNK_ELEMENTS
    size = chunk_size or max(1, elements // max(1, row_elements))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def row_keys(seed: int, step: int, rows: Tensor, draw: int = 0) -> Tensor:
    """The noise keys of some rows at one step of training.

    Args:
        seed: the run's seed.
        step: the optimizer step, or any other counter.
        rows: (B,) int64, what the noise belongs to: a row's index in the data set, not in the batch.
        draw: which of several samples of the same row.

    Returns:
        (B,) int64. Two rows of one call never share a key.
    """
    key = torch.zeros((), dtype=torch.int64)  # the scalars are mixed on the CPU, where a tiny operation is cheap
    for counter in (seed, step, draw):
        key = fold_in(key, counter)
    return fold_in(key, rows)


def fold_in(keys: Tensor, counter: int | Tensor) -> Tensor:
    """New keys from keys and a counter: `fold_in(keys[:, None], torch.arange(T))` has one for each token of each text.

    The mixing function is the finaliser of SplitMix64 (Steele et al. 2014), a bijection of 64-bit words.

    Args:
        keys: (...) int64.
        counter: an integer, or int64 that broadcasts with `keys`.

    Returns:
        int64 of the broadcast shape.
    """
    # int64 arithmetic wraps in torch; the golden-ratio step keeps (key, counter) apart from (key + 1, counter - 1)
    z = _mix_64(keys + _GOLDEN_RATIO) + counter
    return _mix_64(z)


def _mix_64(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (mean 0.5772, variance pi^2 / 6), a pure function of the key and the vocabulary index.

    The 31 random bits behind each number are the same on every device; the two logarithms are the device's own.

    Args:
        keys: (N,) int64, any integers; see `row_keys`.
        vocab_size: V.

    Returns:
        (N, V) float32 on the device of `keys`, finite, between -2.9 and 22.2.
    """
    return _negative_noise(keys, _index_words(vocab_size, keys.device)).neg_()


def _index_words(vocab_size: int, device: torch.device) -> Tensor:
    """(V,) int32: each vocabulary index, well mixed. It is made once a call and shared by all rows."""
    # the golden-ratio offset keeps a small key from meeting an index of its own value, whose words would cancel
    return (_mix_64(torch.arange(vocab_size, device=device) + _GOLDEN_RATIO) & _MASK_31).to(torch.int32)


def _negative_noise(keys: Tensor, words: Tensor) -> Tensor:
    keys = _mix_64(keys)  # row_keys mixes them already; this makes any distinct integers good keys
    # Half of the key permutes the index words, the other half is the first multiplier of a multiply-xorshift hash. All
    # numbers are kept below 2^31, where an arithmetic shift is a logical one; each line is one cheap pass over int32.
    offset = (keys & _MASK_31).to(torch.int32)[:, None]
    multiplier = (_shift_right(keys, 32) & _MASK_31 | 1).to(torch.int32)[:, None]
    bits = torch.bitwise_xor(words, offset)
    bits.mul_(multiplier).bitwise_and_(_MASK_31)
    scratch = bits >> 15
    bits.bitwise_xor_(scratch).mul_(_ODD_31).bitwise_and_(_MASK_31)
    torch.bitwise_right_shift(bits, 16, out=scratch)
    bits.bitwise_xor_(scratch)
    # -log(-log1p(-u)) is exact where it matters: large noise comes from small u, of which float32 has plenty. Its last
    # minus is left to whoever adds it to logits.
    noise = scratch.view(torch.float32).copy_(bits)
    return noise.add_(0.5).mul_(-_TO_UNIT).log1p_().neg_().log_()


def _noisy(
    logits: Tensor, keys: Tensor | None, words: Tensor | None, noise_scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """`logits + noise_scale * g` of a chunk of rows, in float32 or wider; without keys, the logits."""
    if keys is None or words is None:
        return logits.to(_wide_dtype(logits))
    negative = _negative_noise(keys, words).to(_wide_dtype(logits))
    return torch.sub(logits, negative, alpha=noise_scale, out=negative if out is None else out)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    keys: Tensor | None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    noisy: Tensor | None = None,
) -> Tensor:
    """Samples one token a row from `softmax(logits / temperature)` by the Gumbel-max rule.

    Args:
        logits: (N, V), any floating dtype; tokens at -inf are never drawn.
        keys: (N,) int64 noise keys, or None for the most likely token.
        temperature: of the distribution that is sampled; without keys it changes nothing.
        chunk_size: rows worked on at a time.
        noisy: (N, V), from `room_for_noise`, which receives what the tokens are the greatest of.

    Returns:
        (N,) int64 token ids.

    Raises:
        ValueError: if the temperature is not positive, or there is not one key a row.
    """
    _check(logits, keys)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; pass keys=None for the most likely token")
    if keys is None:
        return logits.argmax(dim=-1)
    words = _index_words(logits.shape[-1], logits.device)
    keys = keys.to(logits.device)
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for rows in row_chunks(logits, chunk_size):
        # argmax(logits / T + g) = argmax(logits + T g)
        out = None if noisy is None else noisy[rows]
        token_ids[rows] = _noisy(logits[rows], keys[rows], words, temperature, out).argmax(dim=-1)
    return token_ids


def room_for_noise(logits: Tensor, keys: Tensor | None, temperature: float) -> Tensor | None:
    """Room for the noisy logits of a draw, where the backward pass can have them in place of the logits at no cost in
    memory, and so does not make the noise again: in float32, at temperature 1."""
    pays = torch.is_grad_enabled() and keys is not None and temperature == 1.0 and logits.dtype == torch.float32
    return torch.empty_like(logits, requires_grad=False) if pays else None


def straight_through_embedding(
    logits: Tensor,
    token_ids: Tensor,
    keys: Tensor | None,
    table: Tensor | SummedGradient,
    tau: float,
    chunk_size: int | None = None,
) -> Tensor:
    """The embeddings of sampled tokens, with the gradient of a Gumbel-softmax at temperature `tau`.

    Equal in value and gradients to `(hard - soft.detach() + soft) @ table`, where hard is the one-hot of `token_ids`
    and soft is `softmax((logits + gumbel_noise(keys, V)) / tau)`. Tau shapes the gradient only, never the value. The
    backward product with the table runs in the dtype of the logits, as it would under autocast; the rest in float32.

    Args:
        logits: (N, V), any floating dtype; the only large tensor that is kept for the backward pass.
        token_ids: (N,) int64, as `sample_tokens(logits, keys)` drew them.
        keys: (N,) int64, the keys of that draw; None for no noise.
        table: (V, d) embeddings; its gradient is dense, with non-zero rows at `token_ids` only. Or the sum of a
            table, to which the gradient is added.
        tau: temperature of the soft distribution.
        chunk_size: rows worked on at a time in the backward pass.

    Returns:
        (N, d) in the dtype of the table.

    Raises:
        ValueError: if tau is not positive, or the shapes do not agree.
    """
    return straight_through_embeddings(logits, token_ids, keys, [table], tau, chunk_size)[0]


def straight_through_embeddings(
    logits: Tensor,
    token_ids: Tensor,
    keys: Tensor | None,
    tables: Sequence[Tensor | SummedGradient],
    tau: float,
    chunk_size: int | None = None,
    noisy: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`straight_through_embedding` in several tables, whose backward pass makes noise and softmax once for all.

    `noisy`: what `sample_tokens` has put there; it is kept in place of the logits.
    """
    _check(logits, keys)
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}; a usual range is 0.1 to 2")
    sums = [table if isinstance(table, SummedGradient) else None for table in tables]
    weights = [table.weight if isinstance(table, SummedGradient) else table for table in tables]
    for weight in weights:
        if weight.dim() != 2 or weight.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"table must have one row for each of the {logits.shape[-1]} logits, got shape "
                f"{tuple(weight.shape)}; pass the input embeddings of the model that made the logits"
            )
    if token_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"token_ids must be of shape ({len(logits)},), got {tuple(token_ids.shape)}; flatten the batch"
        )
    if is_plain():
        return _plain_embeddings(logits, token_ids, keys, tables, tau)
    anchors = [None if summed is None else summed.anchor for summed in sums]
    return _StraightThroughEmbeddings.apply(logits, noisy, token_ids, keys, tau, chunk_size, sums, *weights, *anchors)


def _plain_embeddings(
    logits: Tensor,
    token_ids: Tensor,
    keys: Tensor | None,
    tables: Sequence[Tensor | SummedGradient],
    tau: float,
) -> tuple[Tensor, ...]:
    """The same by autograd, with the softmax of all rows."""
    scores = logits.to(_wide_dtype(logits))
    if keys is not None:
        scores = scores + gumbel_noise(keys.to(logits.device), logits.shape[-1])
    soft = torch.softmax(scores / tau, dim=-1)
    nothing = (soft - soft.detach()).to(logits.dtype)  # but for its gradient
    embeddings = []
    for table in tables:
        rows, weight = (
            (table.rows(token_ids), table.weight)
            if isinstance(table, SummedGradient)
            else (table[token_ids], table.detach())
        )
        embeddings.append(rows + (nothing @ weight.to(logits.dtype)).to(rows.dtype))
    return tuple(embeddings)


def _check(logits: Tensor, keys: Tensor | None) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be of shape (rows, vocabulary), got {tuple(logits.shape)}; flatten the batch")
    if keys is not None and keys.shape != logits.shape[:1]:
        raise ValueError(f"keys must be of shape ({len(logits)},), got {tuple(keys.shape)}; make them with row_keys")


class _StraightThroughEmbeddings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        noisy: Tensor | None,
        token_ids: Tensor,
        keys: Tensor | None,
        tau: float,
        chunk_size: int | None,
        sums: list[SummedGradient | None],
        *weights_and_anchors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights = weights_and_anchors[: len(sums)]
        scores, keys = (logits, keys) if noisy is None else (noisy, None)
        ctx.save_for_backward(scores, token_ids, keys, *weights)
        ctx.tau, ctx.chunk_size, ctx.sums = tau, chunk_size, sums
        # clones may share a table; a checkpoint gives back other objects than it was given, so it is seen here
        ctx.tables = [next(j for j, other in enumerate(weights) if other is weight) for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(weight[token_ids] for weight in weights if weight is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, token_ids, keys, *weights = ctx.saved_tensors
        grad_logits = None
        if ctx.needs_input_grad[0]:
            of_tables: dict[int, Tensor] = {}
            for table, grad in zip(ctx.tables, grads, strict=True):
                if grad is not None:
                    of_tables[table] = of_tables[table] + grad if table in of_tables else grad
            uses = [(grad, weights[table]) for table, grad in of_tables.items()]
            grad_logits = _soft_gradient(logits, keys, uses, ctx.tau, ctx.chunk_size)
        needed = ctx.needs_input_grad[-2 * len(grads) :]  # of the weights, then of the anchors
        of_weights: list[Tensor | None] = [None] * len(grads)
        for i, (grad, summed) in enumerate(zip(grads, ctx.sums, strict=True)):
            if grad is None:
                continue
            if summed is not None and needed[len(grads) + i]:
                summed.add_rows(token_ids, grad)
            elif needed[i]:
                of_weights[i] = torch.zeros_like(weights[i]).index_add_(0, token_ids, grad)
        return grad_logits, None, None, None, None, None, None, *of_weights, *(None for _ in grads)


def _soft_gradient(
    logits: Tensor,
    keys: Tensor | None,
    uses: list[tuple[Tensor, Tensor]],
    tau: float,
    chunk_size: int | None,
) -> Tensor:
    """(N, V): `p * (h - sum(p * h)) / tau` with `p = softmax((logits + g) / tau)` and h the sum of `grad W^T` over
    `uses`, gradients (N, d) of embeddings in tables W."""
    words = None if keys is None else _index_words(logits.shape[-1], logits.device)
    keys = None if keys is None else keys.to(logits.device)
    grad_logits: Tensor | None = None
    # One product for all rows, into the tensor that is returned anyway. Autocast is off so that dtypes are as stated
    # even where backward is called inside it.
    with torch.autocast(logits.device.type, enabled=False):
        for grad, table in uses:
            grad_logits = table_product((grad / tau).to(logits.dtype), table.to(logits.dtype), grad_logits)
    assert grad_logits is not None
    for rows in row_chunks(logits, chunk_size):
        scores = _noisy(logits[rows], None if keys is None else keys[rows], words)
        soft = torch.softmax(scores if tau == 1.0 else scores / tau, dim=-1)
        product = soft * grad_logits[rows]
        torch.addcmul(product, soft, product.sum(dim=-1, keepdim=True), value=-1, out=grad_logits[rows])
    return grad_logits
