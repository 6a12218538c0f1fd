"""What a lens says about a text, token by token."""

from __future__ import annotations

import io
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .context_length import context_length
from .losses import kl_divergence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .modeling_consistency_lens import ConsistencyLensModel

TOP_K = 3
CONTROL_CHARACTERS = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))} | {ord("\n"): "⏎"}


@dataclass(frozen=True)
class TokenExplanation:
    """One activation in words.

    Attributes:
        position: P, the index of the token whose activation is read.
        token: that token.
        text: the explanation.
        fve: 1 - |A - Â|² / |A - mean|² of this one activation; 1 is perfect, 0 no better than the mean.
        kl: KL(p(.|A) || p(.|Â)) in nats at this position.
        top_before, top_after: the subject's likeliest next tokens with their probabilities, with A and with Â.
    """

    position: int
    token: str
    text: str
    fve: float
    kl: float
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]


class TokenReading(NamedTuple):
    """What a lens and its subject make of K tokens of one text; on the lens's device."""

    activations: Tensor
    """A, (K, d) float32."""
    texts: list[str]
    """The explanations."""
    reconstructions: Tensor
    """Â, (K, d) float32."""
    variance: Tensor
    """|A - mean|², (K,)."""
    fve: Tensor
    """1 - |A - Â|² / variance of each activation, (K,)."""
    kl: Tensor
    """KL(p(.|A) || p(.|Â)) in nats, (K,)."""
    logits_before: Tensor
    """The subject's next-token logits with A, (K, V)."""
    logits_after: Tensor
    """The same with Â in place of A."""


@dataclass(frozen=True)
class Explanation(Sequence):
    """The explanations of a text's tokens, in order; prints as a table."""

    text: str
    tokens: list[TokenExplanation]

    def __getitem__(self, index: Any) -> Any:
        return self.tokens[index]

    def __len__(self) -> int:
        return len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and numbers."""
        return asdict(self)

    def table(self) -> Table:
        """A rich table, one row for each token."""
        table = Table(title="KL in nats; FVE 1 = perfect, 0 = the mean activation")
        for column in ("position", "token", "explanation", "FVE", "KL", "next before", "next after"):
            table.add_column(column, justify="right" if column in ("position", "FVE", "KL") else "left")
        for row in self.tokens:
            table.add_row(
                str(row.position),
                repr(row.token),
                one_line(row.text),
                f"{row.fve:.2f}",
                f"{row.kl:.2f}",
                format_top(row.top_before),
                format_top(row.top_after),
                style=None,
            )
        return table

    def __str__(self) -> str:
        return printed(self.table())


def printed(table: Table) -> str:
    """A rich table as plain text of at most 150 columns."""
    stream = io.StringIO()
    Console(file=stream, width=150).print(table, markup=False)
    return stream.getvalue()


def one_line(text: str) -> str:
    """A text without the space about it, its line breaks as ⏎, and other control characters as escapes.

    A model that writes bytes may write those that a terminal takes for commands.
    """
    return text.strip().translate(CONTROL_CHARACTERS)


def format_top(top: list[tuple[str, float]]) -> str:
    """`the 41% · a 12%`: tokens with their probabilities."""
    return " · ".join(f"{one_line(token) or repr(token)} {probability:.0%}" for token, probability in top)


def top_tokens(logits: Tensor, tokenizer: PreTrainedTokenizerBase, k: int = TOP_K) -> list[list[tuple[str, float]]]:
    """The k likeliest tokens and their probabilities for each row of logits (N, V)."""
    probabilities, ids = logits.float().softmax(-1).topk(k, dim=-1)
    return [
        [(str(tokenizer.decode([token])), probability) for token, probability in zip(*row, strict=True)]
        for row in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


def text_ids(lens: ConsistencyLensModel, text: str) -> tuple[list[int], int]:
    """A text's token ids, after BOS where the tokenizer has one, and the index of its own first token.

    Raises:
        ValueError: if the text is empty or longer than the subject's context, or no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"explain: got {type(text).__name__} for a text; pass one string, and several one by one")
    if any("\ud800" <= character <= "\udfff" for character in text):  # as JSON may hold
        raise ValueError("explain: the text holds half a character (a lone surrogate); leave it out")
    tokenizer = lens.require_tokenizer()
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = bos + tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == len(bos):
        raise ValueError("explain: got an empty text; pass at least one word")
    limit = context_length(lens.subject.model.config) or len(ids)
    if len(ids) > limit:
        raise ValueError(f"explain: the text has {len(ids)} tokens, the subject reads {limit}; pass a shorter text")
    return ids, len(bos)


def from_start(position: int, length: int, task: str, of: str) -> int:
    """The index of a token of `length`, counted from the start, where `position` may be negative.

    Args:
        position: the token, from the end if negative.
        length: tokens.
        task, of: who asks, and for a token of what; for the error.

    Raises:
        ValueError: if it lies outside, or is no whole number.
    """
    try:
        index = operator.index(position)
    except TypeError as error:
        raise ValueError(
            f"{task}: a position must be a whole number, got {position!r}; count tokens from 0"
        ) from error
    if not -length <= index < length:
        raise ValueError(f"{task}: position {position} lies outside the {of}'s 0..{length - 1}")
    return index % length


@torch.no_grad()
def explain_text(lens: ConsistencyLensModel, text: str, positions: list[int] | None = None) -> Explanation:
    """Reads the activations of a text with `lens`; the work behind `ConsistencyLensModel.explain`.

    Args:
        lens: with its tokenizer and its subject.
        text: any text; BOS is put before it where the tokenizer has one.
        positions: token indices to read, BOS being index 0, negative ones from the end; every token after BOS if None.

    Raises:
        ValueError: if the text is empty or longer than the subject's context, or if there are no positions or one lies
            outside it or is no whole number.
    """
    tokenizer = lens.require_tokenizer()
    ids, start = text_ids(lens, text)
    try:
        positions = list(range(start, len(ids)) if positions is None else positions)
    except TypeError as error:
        raise ValueError(
            f"explain: positions must be a list, got {positions!r}; for one token, a list of one"
        ) from error
    if not positions:
        raise ValueError("explain: got no positions; leave them out to read every token")
    positions = [from_start(position, len(ids), "explain", "text") for position in positions]

    reading = read_tokens(lens, ids, positions)
    columns = (
        positions,
        [tokenizer.decode([ids[p]]) for p in positions],
        reading.texts,
        reading.fve.tolist(),
        reading.kl.tolist(),
        top_tokens(reading.logits_before, tokenizer),
        top_tokens(reading.logits_after, tokenizer),
    )
    return Explanation(text, [TokenExplanation(*row) for row in zip(*columns, strict=True)])


@torch.no_grad()
def read_tokens(lens: ConsistencyLensModel, ids: list[int], positions: list[int]) -> TokenReading:
    """One pass of subject, decoder, encoder and, with each reconstruction in place, the subject again.

    Args:
        lens: with its tokenizer and its subject.
        ids: a text's tokens, BOS included.
        positions: K indices of them.
    """
    input_ids = torch.tensor([ids], device=lens.device)
    context = lens.subject.context(
        input_ids, torch.ones_like(input_ids), torch.tensor([positions], device=lens.device)
    )
    activations = context.activations[0].float()
    decoded = lens.decode(activations)
    reconstructions = lens.encode(decoded.token_ids)
    logits_before, logits_after = context.logits[0], lens.subject.replaced_logits(context, reconstructions[None])[0]
    variance = (activations - lens.mean).square().sum(-1)
    return TokenReading(
        activations=activations,
        texts=decoded.texts,
        reconstructions=reconstructions,
        variance=variance,
        fve=1 - (activations - reconstructions).square().sum(-1) / variance,
        kl=kl_divergence(logits_before, logits_after),
        logits_before=logits_before,
        logits_after=logits_after,
    )
