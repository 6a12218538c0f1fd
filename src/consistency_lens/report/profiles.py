"""Where in a text a lens works: FVE, KL and norm by position and by kind of token, of the texts of an explorer."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..evaluation.metrics import bootstrap_interval, share_recovered
from .explorer import Explorer
from .pieces import CLASSES, token_class

BINS = 10  # of positions, with about as many tokens each
MIN_TOKENS = 8  # a group of fewer says nothing
MIN_TEXTS = 3  # for an interval


class Group(TypedDict):
    """Some tokens, and what the lens makes of them."""

    label: str
    tokens: int
    values: dict[str, list[float]]
    """`fve`, `kl`, `norm`: value and, where there are enough texts, the ends of its 95% interval."""


class Profiles(TypedDict):
    position: list[Group]
    token_class: list[Group]


def profiles(explorer: Explorer) -> Profiles:
    """Groups of tokens by position and by kind; intervals by bootstrap over texts."""
    columns = token_columns(explorer)
    positions = columns["position"]
    edges = positions.quantile(torch.linspace(0, 1, BINS + 1, dtype=positions.dtype)).floor().unique()[1:]
    place = torch.bucketize(positions, edges)
    by_position = [
        group(f"{int(positions[chosen].min())}–{int(positions[chosen].max())}", columns, chosen)
        for chosen in (place == index for index in range(len(edges)))
        if chosen.sum() >= MIN_TOKENS
    ]
    kinds = columns["kind"]
    by_class = [
        group(name, columns, chosen)
        for name, chosen in ((name, kinds == index) for index, name in enumerate(CLASSES))
        if chosen.sum() >= MIN_TOKENS
    ]
    return Profiles(position=by_position, token_class=by_class)


def token_columns(explorer: Explorer) -> dict[str, Tensor]:
    """All tokens of all texts as columns of float64."""
    columns: dict[str, list[float]] = {
        name: [] for name in ("text", "position", "kind", "fve", "kl", "norm", "variance")
    }
    for index, text in enumerate(explorer["texts"]):
        pieces = [explorer["words"][place] for place in text["tokens"]]
        columns["text"] += [index] * len(pieces)
        columns["kind"] += kinds_of(pieces)
        columns["position"] += text["positions"]
        for name in ("fve", "kl", "norm", "variance"):
            columns[name] += text[name]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def kinds_of(pieces: Sequence[str]) -> list[int]:
    """The class of each piece of one text, as its place in `CLASSES`."""
    before = ["", *pieces[:-1]]
    return [CLASSES.index(token_class(piece, of)) for piece, of in zip(pieces, before, strict=True)]


def group(label: str, columns: Mapping[str, Tensor], chosen: Tensor) -> Group:
    of = {name: column[chosen] for name, column in columns.items()}
    sums = {
        "error": (1 - of["fve"]) * of["variance"],
        "variance": of["variance"],
        "kl": of["kl"],
        "norm": of["norm"],
        "count": torch.ones_like(of["kl"]),
    }
    statistics: dict[str, Any] = {
        "fve": lambda s: share_recovered(s["error"], s["variance"]),
        "kl": lambda s: s["kl"] / s["count"],
        "norm": lambda s: s["norm"] / s["count"],
    }
    texts = of["text"].long()
    values = {}
    for name, statistic in statistics.items():
        values[name] = [float(statistic({key: column.sum() for key, column in sums.items()}))]
        if len(texts.unique()) >= MIN_TEXTS:
            values[name] += bootstrap_interval(statistic, sums, texts)
    return Group(label=label, tokens=len(texts), values=values)
