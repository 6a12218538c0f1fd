"""The best and the worst that a lens said, of the tokens of an explorer or of a run's sample rows."""

from collections.abc import Sequence
from typing import Any, TypedDict

from .explorer import Explorer, ExplorerText

CASES = 6  # of each kind
CONTEXT = 40  # tokens before the one that is read


class Case(TypedDict):
    """One activation: what was read, what the lens said, what the words were worth."""

    context: str
    """The text before the token."""
    token: str
    explanation: str
    fve: float
    kl: float
    before: list[list[Any]]
    """[token, probability] of the subject's likeliest next tokens."""
    after: list[list[Any]]
    place: list[int] | None
    """Text and token of the explorer, where it is from there."""


class Cases(TypedDict):
    best: list[Case]
    worst: list[Case]


def cases(explorer: Explorer | None, samples: Sequence[Case]) -> Cases | None:
    """The highest and the lowest FVE, no two of one text; of the explorer's tokens, or else of the samples."""
    if explorer is None:
        ranked = sorted(samples, key=lambda case: case["fve"], reverse=True)
        half = min(CASES, len(ranked) // 2)
        return Cases(best=ranked[:half], worst=ranked[::-1][:half]) if half else None
    best = extremes(explorer, highest=True)
    return Cases(best=best, worst=extremes(explorer, highest=False))


def extremes(explorer: Explorer, highest: bool) -> list[Case]:
    """The best or the worst token of each text, and of those the most extreme."""
    pick = max if highest else min
    places = [
        (index, pick(range(len(text["fve"])), key=text["fve"].__getitem__))
        for index, text in enumerate(explorer["texts"])
    ]
    places.sort(key=lambda place: explorer["texts"][place[0]]["fve"][place[1]], reverse=highest)
    found: dict[tuple[str, str], Case] = {}  # the same words for the same token are one case
    for text, token in places:
        case = case_at(explorer, text, token)
        found.setdefault((case["token"], case["explanation"]), case)
    return list(found.values())[:CASES]


def case_at(explorer: Explorer, text: int, token: int) -> Case:
    """A token of an explorer as a case."""
    words, of = explorer["words"], explorer["texts"][text]
    pieces = [words[place] for place in of["tokens"][max(0, token - CONTEXT) : token + 1]]
    return Case(
        context="".join(pieces[:-1]),
        token=pieces[-1],
        explanation="".join(of["explanations"][token]),
        fve=of["fve"][token],
        kl=of["kl"][token],
        before=top_of(words, of, "before", token),
        after=top_of(words, of, "after", token),
        place=[text, token],
    )


def top_of(words: Sequence[str], text: ExplorerText, column: str, token: int) -> list[list[Any]]:
    flat: list[Any] = text[column][token]  # type: ignore[literal-required]
    return [[words[int(place)], probability] for place, probability in zip(flat[::2], flat[1::2], strict=True)]


def sample_cases(samples: Sequence[dict[str, Any]]) -> list[Case]:
    """Rows of `samples.jsonl` as cases."""
    return [
        Case(
            context=row["context"].rpartition("«")[0],
            token=row["context"].rpartition("«")[2].removesuffix("»"),
            explanation=row["explanation"],
            fve=float(row["fve"]),
            kl=float(row["kl"]),
            before=row["top_before"],
            after=row["top_after"],
            place=None,
        )
        for row in samples
    ]


def spread(samples: Sequence[Case], count: int = 3) -> list[Case]:
    """Samples from high to low FVE at equal steps, the ends left out: of many, three are the quartiles."""
    ranked = sorted(samples, key=lambda case: case["fve"], reverse=True)
    if len(ranked) <= count:
        return ranked
    return [ranked[round((len(ranked) - 1) * (step + 1) / (count + 1))] for step in range(count)]
