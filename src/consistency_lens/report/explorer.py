"""Texts as a lens reads them, token by token: the part of a report that is walked through.

An `Explorer` is a JSON object; beside a run it lies as `explorer.json`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.ablation import split_words, without_each
from ..evaluation.metrics import squared_error
from ..explanation import read_tokens, top_tokens
from ..modeling_consistency_lens import ConsistencyLensModel
from .pieces import token_pieces

FORMAT, VERSION = "consistency-lens-explorer", 1
TOP_K = 5
POSITIONS = 128  # read side by side: each has two rows of logits
ABLATED = 512  # texts that the encoder reads side by side
DIGITS = 4  # significant ones of every number


class ExplorerText(TypedDict):
    """One text of S tokens that were read, BOS not among them. Each list has S entries, one for each token."""

    title: str
    tokens: list[int]
    """Places in `words`."""
    positions: list[int]
    """P, the index of the token in the text as the subject reads it, BOS being 0."""
    explanations: list[list[str]]
    """The lens's text as its words, each with the white space before it: joined they are the text."""
    losses: list[list[float]]
    """For each of these words what the FVE of this activation loses without it; empty for a text of one word, and
    where that was not tried."""
    fve: list[float]
    kl: list[float]
    """KL(p(.|A) || p(.|Â)) in nats."""
    norm: list[float]
    """|A|."""
    variance: list[float]
    """|A - mean|², which FVE is a share of."""
    before: list[list[float]]
    """The subject's likeliest next tokens: place in `words`, probability, place, probability, ..."""
    after: list[list[float]]
    """The same with the reconstruction in place of the activation."""


class Explorer(TypedDict):
    """Texts as a lens reads them."""

    format: str
    version: int
    source: str
    """Where the texts are from, for people."""
    lens: str | None
    """Sha256 of the lens's weights file; what was kept of another lens is not shown as this one's."""
    max_tokens: int
    """How many tokens were to be read in all."""
    ablation: bool
    """Whether it was tried what is lost without each word."""
    words: list[str]
    """Every string that is a token or a prediction, each once."""
    texts: list[ExplorerText]


class Words:
    """Strings by number, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))

    def __iter__(self) -> Any:
        return iter(self.places)


@torch.no_grad()
def read_texts(
    lens: ConsistencyLensModel,
    texts: Iterable[tuple[str, Sequence[int]]],
    *,
    source: str,
    max_tokens: int,
    lens_hash: str | None = None,
    top_k: int = TOP_K,
    ablation: bool = True,
    progress: bool = False,
) -> Explorer:
    """Reads texts with a lens, until `max_tokens` tokens are read; the last text may be cut.

    Args:
        lens: in evaluation mode, with its tokenizer and its subject.
        texts: title and token ids of each, BOS included where the subject reads one.
        source: where they are from, for people.
        max_tokens: how many tokens are read in all.
        lens_hash: of the lens's weights file.
        top_k: predictions kept of each token.
        ablation: try what is lost without each word of an explanation; the encoder reads once more for each.
        progress: show a progress bar.

    Raises:
        ValueError: if there is nothing to read.
    """
    words, left, read = Words(), max_tokens, []
    with tqdm(total=max_tokens, unit="token", desc="reading texts", disable=not progress) as bar:
        for title, ids in texts:
            ids = list(ids)[: left + starts_with_bos(lens, ids)]
            if len(ids) > starts_with_bos(lens, ids):
                read.append(read_text(lens, title, ids, words, top_k, ablation))
                bar.update(len(read[-1]["tokens"]))
                left -= len(read[-1]["tokens"])
            if left <= 0:
                break
    if not read:
        raise ValueError("texts: there is no token to read; pass a text, and --max_tokens of at least 1")
    return Explorer(
        format=FORMAT,
        version=VERSION,
        source=source,
        lens=lens_hash,
        max_tokens=max_tokens,
        ablation=ablation,
        words=list(words),
        texts=read,
    )


def read_text(
    lens: ConsistencyLensModel, title: str, ids: list[int], words: Words, top_k: int = TOP_K, ablation: bool = True
) -> ExplorerText:
    """Reads every token of a text but BOS; `words` grows by what is new in it."""
    tokenizer = lens.require_tokenizer()
    positions = list(range(starts_with_bos(lens, ids), len(ids)))
    pieces = token_pieces(tokenizer, ids)
    text = ExplorerText(
        title=title, tokens=[words(pieces[p]) for p in positions], positions=positions,
        explanations=[], losses=[], fve=[], kl=[], norm=[], variance=[], before=[], after=[],
    )  # fmt: skip
    for start in range(0, len(positions), POSITIONS):
        chosen = positions[start : start + POSITIONS]
        # the tokens after the last of them change nothing
        reading = read_tokens(lens, ids[: chosen[-1] + 1], chosen)
        text["explanations"] += [split_words(of) or [of] for of in reading.texts]
        ablated = losses_without_words(lens, reading.activations, reading.texts) if ablation else [[] for _ in chosen]
        text["losses"] += ablated
        text["fve"] += rounded(reading.fve)
        text["kl"] += rounded(reading.kl)
        text["norm"] += rounded(reading.activations.norm(dim=-1))
        text["variance"] += rounded(reading.variance)
        for name, logits in (("before", reading.logits_before), ("after", reading.logits_after)):
            text[name] += [  # type: ignore[literal-required]
                [part for token, probability in top for part in (words(token), significant(probability))]
                for top in top_tokens(logits, tokenizer, top_k)
            ]
    return text


def losses_without_words(lens: ConsistencyLensModel, activations: Tensor, texts: Sequence[str]) -> list[list[float]]:
    """What the FVE of each activation loses without each word of its text; see `evaluation.ablation.word_importance`.

    Args:
        lens: in evaluation mode, with its tokenizer.
        activations: A, (K, d).
        texts: K explanations.

    Returns:
        A list for each text, empty where it has fewer than two words.
    """
    asked = [[text, *rests] if (rests := without_each(split_words(text))) else [] for text in texts]
    flat = [(row, text) for row, of in enumerate(asked) for text in of]
    shares: list[list[float]] = [[] for _ in texts]
    # by length, so that the rows of a batch need little padding
    order = sorted(range(len(flat)), key=lambda place: len(flat[place][1]))
    found: dict[int, float] = {}
    for start in range(0, len(order), ABLATED):
        places = order[start : start + ABLATED]
        rows = torch.tensor([flat[place][0] for place in places], device=activations.device)
        reconstructions = lens.encode([flat[place][1] for place in places])
        error = squared_error(activations[rows], reconstructions) / squared_error(activations[rows], lens.mean)
        found |= dict(zip(places, error.tolist(), strict=True))
    for place, (row, _) in enumerate(flat):
        shares[row].append(found[place])
    return [[significant(error - whole) for error in rest] for whole, *rest in (of or [0.0] for of in shares)]


def starts_with_bos(lens: ConsistencyLensModel, ids: Sequence[int]) -> int:
    """1 if the text begins with BOS, which is no token of its own, else 0."""
    bos = lens.require_tokenizer().bos_token_id
    return int(bos is not None and len(ids) > 0 and ids[0] == bos)


def rounded(values: Tensor) -> list[float]:
    return [significant(value) for value in values.tolist()]


def significant(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
