"""The subject: the frozen model being read, and its next-token logits after one residual was replaced.

The context before position P does not change when the residual at P is replaced. So one pass over the context, without
gradient, gives the activations, the original logits and the key-value cache; the replaced pass is the K tokens at the
positions alone, each against the cache entries before it and itself.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .attention import attention_with_masks
from .cached_passes import keeps_keys_and_values
from .context_attention import attending_to
from .context_cache import ContextCache, ContextComplete, beside, empty_cache, joined, kept, reopened
from .context_length import context_length
from .residual_stream import ResidualStream, gather_positions, token_device
from .spans import span
from .token_logits import head_logits
from .turns import in_turn

logger = logging.getLogger(__name__)

# Random sequences that the self-check runs: the first of full length, the second padded.
CHECK_ROWS, CHECK_POSITIONS, CHECK_MIN_LENGTH = 2, 3, 16

# In which passes sequences run: the first n of a batch, cut to their first t tokens, are one pass (n, t), and so on.
Passes = Sequence[tuple[int, int]]


class SubjectContext(NamedTuple):
    """One pass of the subject over B sequences, read at K positions each."""

    activations: Tensor
    """Output of block `layer` at the positions, (B, K, d), in the model's dtype."""
    logits: Tensor
    """Next-token logits at the positions, (B, K, V); or the hidden states (B, K, d) that `Subject.head` makes them of,
    where these were asked for."""
    cache: ContextCache | None
    """Keys and values of the blocks above `layer`, pass by pass; None where the one-token pass is not in use."""
    input_ids: Tensor
    """(B, S) int64, right-padded."""
    attention_mask: Tensor
    """(B, S), 1 for real tokens."""
    positions: Tensor
    """(B, K) int64."""


class Subject:
    """The frozen model being read: its activations, its logits, and its logits after one residual was replaced.

    Several threads may use it at once: whatever runs the model does so `in_turn`.

    Args:
        model: a causal language model; it is frozen and put in evaluation mode.
        layer: the block whose output is read and replaced, 0-based.
        blocks, final_norm: see `ResidualStream`.
        one_token: use the one-token pass where the architecture allows it. Where it does not, as a self-check finds
            out, the plain pass over the whole sequence is used and the log says so once.
        context_attention: in the one-token pass, use an attention that leaves the context where it is
            (`context_attention`), again where the architecture allows it; if not, new keys and values are appended.

    Raises:
        ValueError: if the model has no such layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: int,
        one_token: bool = True,
        blocks: str | None = None,
        final_norm: str | None = None,
        context_attention: bool = True,
    ) -> None:
        self._paths = {"blocks": blocks, "final_norm": final_norm}
        self.layer = layer
        self.change_model(model)
        self._one_token, self._context_attention = one_token, context_attention
        self._checked_length: float = 0

    def change_model(self, model: PreTrainedModel) -> None:
        """Takes the model, or another copy of the same weights in place of the one before."""
        self.model = model.requires_grad_(False).eval()
        self.stream = ResidualStream(model, **self._paths)
        self.stream.check_layer(self.layer)

    @torch.no_grad()
    def activations(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Output of block `layer` at every token, (B, S, d); the blocks above and the head do not run.

        Args:
            input_ids: right-padded tokens, (B, S) int64.
            attention_mask: 1 for real tokens, (B, S).
        """
        with in_turn(self.model), span("context pass"), self.stream.capture(self.layer, stop=True) as captured:
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return captured.activations

    @torch.no_grad()
    def context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        check: bool = True,
        with_head: bool = True,
        passes: Passes | None = None,
    ) -> SubjectContext:
        """Reads the subject at `positions`: activations, next-token logits and the cache for the replaced pass.

        Args:
            input_ids: right-padded tokens, (B, S) int64.
            attention_mask: 1 for real tokens, (B, S).
            positions: indices of real tokens, (B, K) int64.
            check: look whether they are, which waits for the device; a collator's batches need it not.
            with_head: if False, hidden states stand for the logits, here and in the replaced pass.
            passes: which of the sequences run together, if not all; what is cut off is padding.

        Raises:
            ValueError: with `check`, if the shapes do not fit, a row is padded on the left or a position is not a real
                token.
        """
        if check:
            _check_inputs(input_ids, attention_mask, positions)
        with in_turn(self.model):
            one_token = self.check_one_token(input_ids.shape[1] + positions.shape[1])
            with span("context pass"):
                return self._context(input_ids, attention_mask, positions, one_token, with_head, passes=passes)

    def run(self, with_head: bool, **inputs: Any) -> Tensor:
        """The model's logits (B, S, V), or the hidden states (B, S, d) before its head."""
        with in_turn(self.model):
            if with_head:
                return self.model(**inputs).logits
            with self.stream.capture_last_states() as captured:
                output = self.model(**inputs)
        return _HandOn.apply(captured.activations, output.logits)

    def head(self, states: Tensor) -> Tensor:
        """Logits (n, V) of hidden states (n, d) before the head; gradient flows to them."""
        with in_turn(self.model):
            return head_logits(self.model, states)

    def replaced_logits(self, context: SubjectContext, activations: Tensor, with_head: bool = True) -> Tensor:
        """Next-token logits at each position after its residual alone was replaced; gradient flows to `activations`.

        Args:
            context: what `context` returned.
            activations: the new outputs of block `layer`, (B, K, d). Each of the K replacements is on its own: a
                position does not see those at the others.
            with_head: if False, the hidden states (B, K, d) are returned that `head` makes the logits of.

        Returns:
            Logits, (B, K, V).
        """
        if context.cache is None:
            return self.replaced_logits_full(context, activations, with_head)
        batch_size, num_positions = context.positions.shape
        queries = torch.arange(num_positions, device=context.positions.device).expand(batch_size, -1)
        replaced = self.stream.replace(self.layer, queries, activations)
        with in_turn(self.model), replaced, self._reading(context) as past:
            return self.run(
                with_head,
                input_ids=context.input_ids.gather(1, context.positions),
                attention_mask=self._attention_mask(context, dtype=next(_keys(context.cache)).dtype),
                position_ids=context.positions,
                past_key_values=past,
                use_cache=True,
            )

    @contextmanager
    def _reading(self, context: SubjectContext) -> Iterator[DynamicCache]:
        """A cache with which tokens at the positions, run inside the `with` block, attend to the context."""
        assert context.cache is not None
        length = context.input_ids.shape[1]
        if self._context_attention:
            with attending_to(self.model, context.cache):
                yield beside(self.stream.num_layers, length)
        else:
            with attention_with_masks(self.model):
                yield reopened(context.cache, length)

    def replaced_logits_full(self, context: SubjectContext, activations: Tensor, with_head: bool = True) -> Tensor:
        """As `replaced_logits`, by K passes over the whole sequence: the reference, right for any architecture."""
        logits = []
        for position, activation in zip(context.positions.split(1, dim=1), activations.split(1, dim=1), strict=True):
            replaced = self.stream.replace(self.layer, position, activation)
            with in_turn(self.model), replaced, self.stream.select_positions(position):
                inputs = {"input_ids": context.input_ids, "attention_mask": context.attention_mask}
                logits.append(self.run(with_head, **inputs, use_cache=False))
        return torch.cat(logits, dim=1)

    def check_one_token(self, length: int) -> bool:
        """Whether the one-token pass is in use for sequences of `length` tokens; tries the model where not known yet.

        `context` calls it by itself. Where ranks share the subject's weights (FSDP, ZeRO-3), first call it on every
        rank with the longest length, so that none runs a check on its own later.

        Args:
            length: tokens of the sequence plus the number of positions.
        """
        with in_turn(self.model):
            if self._one_token and length > self._checked_length:
                self._try_one_token(length)
            return self._one_token

    def _try_one_token(self, length: int) -> None:
        """Tries the one-token pass, in one way and the other, at the length of which `check_one_token` has to know."""
        name, limit = type(self.model).__name__, context_length(self.model.config) or math.inf
        tested_length = int(min(max(CHECK_MIN_LENGTH, 1 << (length - 1).bit_length()), limit))
        reason = self._failure_of_one_token(tested_length)
        if reason is not None and self._context_attention:
            logger.debug("%s: keys and values are appended to a context: %s", name, reason)
            self._context_attention = False
            reason = self._failure_of_one_token(tested_length)
        # A model cannot be tried beyond its positions: the answer there is the answer for good.
        self._checked_length = math.inf if tested_length == limit else tested_length
        if reason is not None:
            self._one_token = False
            log = "%s: the one-token pass is off, whole sequences are run instead, which is as right but slower: %s"
            logger.warning(log, name, reason)

    def _context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        keep_cache: bool,
        with_head: bool = True,
        always_stop: bool = False,
        passes: Passes | None = None,
    ) -> SubjectContext:
        # The last block gives the context keys and values alone; the tokens at the positions then run once more.
        again = positions.shape[1] * (self.stream.num_layers - 1 - self.layer)
        stop = keep_cache and self.stream.may_stop and again > 0 and (always_stop or again < input_ids.shape[1])
        sequences = (input_ids, attention_mask, positions)
        read = [self._read(part, keep_cache, with_head, stop) for part in in_passes(passes, *sequences)]
        activations, logits, caches = zip(*read, strict=True)
        context = SubjectContext(
            activations=torch.cat(activations),
            logits=torch.cat(logits),
            cache=self._kept(caches, input_ids.shape[1]) if keep_cache else None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=positions,
        )
        if not stop:
            return context
        return context._replace(logits=self.replaced_logits(context, context.activations, with_head))

    def _kept(self, caches: Sequence[DynamicCache], length: int) -> ContextCache:
        """What the passes of a context keep, in the form that the replaced pass reads."""
        return kept(caches) if self._context_attention else joined(kept(caches), length)

    def _read(
        self, sequences: tuple[Tensor, ...], keep_cache: bool, with_head: bool, stop: bool
    ) -> tuple[Tensor, Tensor, DynamicCache | None]:
        """One pass: activations (B, K, d), logits (B, K, V), of which there are none if it is to `stop` in the last
        block, and its cache."""
        input_ids, attention_mask, positions = sequences
        # The replaced pass overwrites the output of block `layer`; of the last block, the mask takes its dtype.
        num_blocks = self.stream.num_layers
        cache = empty_cache(num_blocks, min(self.layer + 1, num_blocks - 1), stop) if keep_cache else None
        # Padding is on the right, where no real token sees it. So there need not be a mask, which kernels of causal
        # attention are slower with; the self-check compares with a pass that has one.
        mask = None if keep_cache else attention_mask
        logits = torch.empty(0)
        try:
            with self.stream.capture(self.layer) as captured, self.stream.select_positions(positions):
                inputs = {"input_ids": input_ids, "attention_mask": mask}
                logits = self.run(with_head, **inputs, past_key_values=cache, use_cache=keep_cache)
        except ContextComplete:
            pass
        return gather_positions(captured.activations, positions), logits, cache

    def _attention_mask(self, context: SubjectContext, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Additive masks (B, 1, K, S + K): a query sees the real tokens before its position, and itself.

        `dtype` is the keys' dtype: the one that attention runs in, under autocast too. One tensor is returned, or one
        for each kind of attention where the model mixes full and sliding-window blocks.
        """
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        default = "full_attention" if window is None else "sliding_attention"
        kinds = set(getattr(config, "layer_types", None) or [default])

        positions = context.positions
        distance = positions[..., None] - torch.arange(context.input_ids.shape[1], device=positions.device)
        before = (distance > 0) & context.attention_mask[:, None].bool()
        itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device).expand(
            len(positions), -1, -1
        )
        visible = {"full_attention": before}
        if window is not None:
            visible["sliding_attention"] = before & (distance < window)
        masks = {}
        for kind in kinds:
            hidden = ~torch.cat([visible[kind], itself], dim=-1)[:, None]
            masks[kind] = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        return masks if len(masks) > 1 else masks.popitem()[1]

    @torch.no_grad()
    def _failure_of_one_token(self, length: int) -> str | None:
        """Runs both passes on random sequences of `length` tokens; why the one-token pass must stay off, or None."""
        if not keeps_keys_and_values(self.model):
            return "it cannot go on behind a context by keys and values alone"
        input_ids, attention_mask, positions = self._random_inputs(length)
        reference = self._context(input_ids, attention_mask, positions, keep_cache=False)
        # The residuals of the other row: of realistic size, and wrong enough to show.
        replacement = reference.activations.roll(1, dims=0)
        expected = self.replaced_logits_full(reference, replacement)
        try:
            context = self._context(input_ids, attention_mask, positions, keep_cache=True, always_stop=True)
            logits = self.replaced_logits(context, replacement)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code does with a mask that it does not know
            logger.debug("%s: the one-token pass fails with %r", type(self.model).__name__, error)
            return "its code does not take the mask or the cache that this needs"
        dtypes = {self.model.dtype, logits.dtype, *(keys.dtype for keys in _keys(context.cache or ()))}
        # Rounding stays below the root of the dtype's precision (and of TF32's); a wrong mask does not.
        tolerance = max(1e-3, *(math.sqrt(torch.finfo(dtype).eps) for dtype in dtypes))
        expected = expected.float()
        difference = (logits.float() - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()
        # Written so that NaN fails.
        if difference <= tolerance:
            return None
        return f"its logits differ by {difference:.1e} of their size at {length} tokens (tolerance {tolerance:.1e})"

    def _random_inputs(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input ids, attention mask and positions of random sequences; the global random state is left alone."""
        generator = torch.Generator().manual_seed(0)
        shape = (CHECK_ROWS, length)
        input_ids = torch.randint(self.model.config.get_text_config().vocab_size, shape, generator=generator)
        lengths = torch.tensor([length, max(CHECK_POSITIONS, length * 3 // 4)])
        attention_mask = (torch.arange(length) < lengths[:, None]).long()
        fractions = torch.rand(CHECK_ROWS, CHECK_POSITIONS, generator=generator)
        fractions[:, -1] = 1.0
        positions = (fractions * (lengths[:, None] - 1)).long()
        device = token_device(self.model)
        return input_ids.to(device), attention_mask.to(device), positions.to(device)


class _HandOn(torch.autograd.Function):
    """Hands states on, and in the backward pass a gradient of zero to the logits beside them: FSDP2 gathers a model's
    weights when the gradient of its output comes, and so one has to come."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def in_passes(passes: Passes | None, *sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The sequences of each pass: `input_ids` (B, S), `attention_mask` (B, S) and `positions` (B, K), or no positions.

    Without `passes` there is one.
    """
    if passes is None:
        yield sequences
        return
    parts = [tensor.split([count for count, _ in passes]) for tensor in sequences]
    for (_, length), (input_ids, attention_mask, *positions) in zip(passes, zip(*parts, strict=True), strict=True):
        yield input_ids[:, :length], attention_mask[:, :length], *positions


def _keys(cache: ContextCache) -> Iterator[Tensor]:
    """The keys of all passes and of the blocks that keep them."""
    return (states[0] for one_pass in cache for states in one_pass if states is not None)


def _check_inputs(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> None:
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and attention_mask must both be (B, S), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}"
        )
    if positions.ndim != 2 or len(positions) != len(input_ids):
        raise ValueError(f"positions must be (B, K) with B={len(input_ids)}, got {tuple(positions.shape)}")
    length = input_ids.shape[1]
    inside = (positions >= 0) & (positions < length)
    real = inside & attention_mask.gather(1, positions.clamp(0, length - 1)).bool()
    if not (real.all() & attention_mask[:, 0].all()):
        raise ValueError(
            "positions must be indices of real tokens in sequences padded on the right, got a position on padding or "
            "outside the sequence, or a row padded on the left; set tokenizer.padding_side='right'"
        )
