"""Edit the lens's words for one activation, and steer the subject along the difference that the edit makes.

The encoder E turns the edit into a direction, E(edited) - E(original), which is added to the true activation. So what
the words do not say stays as it was, and what the encoder gets wrong about both texts alike cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .cached_passes import evaluating
from .explanation import format_top, from_start, one_line, printed, text_ids, top_tokens
from .losses import kl_divergence

if TYPE_CHECKING:
    from .modeling_consistency_lens import ConsistencyLensModel


@dataclass(frozen=True, eq=False)
class Steering:
    """The subject before and after an edit of the lens's words for one activation; prints as a table.

    Attributes:
        prompt: the text that the subject reads.
        position: P, the index of the token whose activation is steered.
        token: that token.
        explanation: the lens's words for A.
        edited: the words in their place.
        direction: scale * (E(edited) - E(explanation)), (d,) float32.
        activation: A, (d,) float32; the subject went on from A + direction.
        kl: KL(p(.|A) || p(.|A + direction)) in nats.
        top_before, top_after: the subject's likeliest next tokens with their probabilities, with A and with
            A + direction.
    """

    prompt: str
    position: int
    token: str
    explanation: str
    edited: str
    direction: Tensor
    activation: Tensor
    kl: float
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]

    def table(self) -> Table:
        """A rich table, one row before the edit and one after it."""
        share = float(self.direction.norm() / self.activation.norm())
        title = (
            f"token {self.token!r} at position {self.position}; KL {self.kl:.2f} nats; |direction| {share:.0%} of |A|"
        )
        table = Table("", "words", "next", title=Text(title))
        for name, words, top in (
            ("before", self.explanation, self.top_before),
            ("after", self.edited, self.top_after),
        ):
            # As Text, since a model's words may look like rich's markup.
            table.add_row(name, Text(one_line(words)), Text(format_top(top)))
        return table

    def __str__(self) -> str:
        return printed(self.table())


@torch.no_grad()
def text_direction(lens: ConsistencyLensModel, original: str, edited: str) -> Tensor:
    """E(edited) - E(original), (d,) float32; the work behind `ConsistencyLensModel.direction`."""
    with evaluating(lens.encoder):
        return lens.encode(edited)[0] - lens.encode(original)[0]


@torch.no_grad()
def steer_text(
    lens: ConsistencyLensModel,
    prompt: str,
    edit: str | Callable[[str], str],
    position: int = -1,
    scale: float = 1.0,
) -> Steering:
    """Steers the subject at one token of `prompt`; the work behind `ConsistencyLensModel.steer`.

    Args:
        lens: with its tokenizer and its subject.
        prompt: any text; BOS is put before it where the tokenizer has one.
        edit: the whole edited explanation, or a function from the lens's words to it. White space counts, as in any
            text: many tokenizers read a word with a space before it as another token.
        position: the token to steer at, BOS being index 0; negative ones count from the end.
        scale: the length of the step along E(edited) - E(explanation); 0 changes nothing, -1 steers away.

    Raises:
        ValueError: if the prompt is empty or longer than the subject's context, the position lies outside it or
            is no whole number, the scale is not finite, or the edited explanation is empty or the same as the lens's.
    """
    tokenizer, subject = lens.require_tokenizer(), lens.subject
    ids, _ = text_ids(lens, prompt)
    position = from_start(position, len(ids), "steer", "prompt")
    if not math.isfinite(scale):
        raise ValueError(f"steer: scale must be a finite number, got {scale}")

    input_ids = torch.tensor([ids], device=lens.device)
    context = subject.context(input_ids, torch.ones_like(input_ids), torch.tensor([[position]], device=lens.device))
    activation = context.activations[0].float()
    explanation = lens.decode(activation).texts[0]
    edited = edited_text(edit, explanation)
    direction = scale * text_direction(lens, explanation, edited)
    before = context.logits[0]
    after = subject.replaced_logits(context, (activation + direction)[None])[0]
    return Steering(
        prompt=prompt,
        position=position,
        token=str(tokenizer.decode([ids[position]])),
        explanation=explanation,
        edited=edited,
        direction=direction,
        activation=activation[0],
        kl=kl_divergence(before, after).item(),
        top_before=top_tokens(before, tokenizer)[0],
        top_after=top_tokens(after, tokenizer)[0],
    )


def edited_text(edit: str | Callable[[str], str], explanation: str) -> str:
    """The edited explanation, checked.

    Raises:
        ValueError: if it is no text, empty, or the explanation itself.
    """
    edited = edit(explanation) if callable(edit) else edit
    if not isinstance(edited, str) or not edited.strip():
        raise ValueError(f"steer: the edited explanation must be a text of at least one word, got {edited!r}")
    if edited == explanation:
        raise ValueError(f"steer: the edit leaves the explanation as it is, {explanation!r}; change a word of it")
    return edited
