"""The figures of `metrics.json` for a page: values with intervals, controls, and what the comparison says."""

from collections.abc import Mapping
from typing import Any, TypedDict

from ..evaluation.controls import CONTROLS
from ..evaluation.report import METRICS, READERS, check_tables
from ..evaluation.text_length import PARTS

LENS = "the lens's text"


class Figure(TypedDict):
    """A metric."""

    name: str
    label: str
    value: float
    interval: list[float] | None
    decimals: int


class Compared(TypedDict):
    """What a reconstruction is worth: of the lens, of a control or of another reader."""

    name: str
    label: str
    meaning: str
    fve: float
    kl_recovered: float | None
    interval: list[float] | None
    """95%, of `fve`."""
    kl_interval: list[float] | None
    """95%, of `kl_recovered`."""


class BestOf(TypedDict):
    n: int
    fve: float
    kl_recovered: float


class ReadInPart(TypedDict):
    """What a reconstruction is worth by how many tokens are read, of one text; each list has an entry for each."""

    label: str
    tokens: list[int]
    fve: list[float]
    kl_recovered: list[float]
    intervals: list[list[float]]
    """95%, of `fve`."""
    kl_intervals: list[list[float]]
    """95%, of `kl_recovered`."""


class Probed(TypedDict):
    """The share of rows in which a token of the context is named."""

    offset: int
    """Tokens before P."""
    probe: float
    text: float
    shuffled: float


class Table(TypedDict):
    title: str
    columns: list[str]
    rows: list[list[str]]


def figures(metrics: Mapping[str, Any]) -> list[Figure]:
    """The metrics that were measured, in the order of the reports."""
    return [
        Figure(name=name, label=label, value=metrics[name], interval=interval_of(metrics, name), decimals=decimals)
        for name, (label, decimals) in METRICS.items()
        if is_number(metrics.get(name))
    ]


def comparison(metrics: Mapping[str, Any]) -> list[Compared]:
    """The lens, then its controls."""
    if not is_number(metrics.get("fve")):
        return []
    lens = compared("lens", LENS, "", metrics, metrics)
    controls = []
    for name, values in metrics.get("controls", {}).items():
        meaning = CONTROLS.get(name, "")
        if "bits" in values:
            meaning += f", {values['bits']:.0f} bits"
        label = name.replace("_", " ")
        controls.append(compared(name, label, meaning, values, metrics, f"controls.{name}."))
    return [lens, *controls]


def readers(metrics: Mapping[str, Any]) -> list[Compared]:
    """The lens's words read by others than its own encoder; empty where that was not looked at."""
    code = metrics.get("private_code")
    if not code:
        return []
    own = compared("lens", "own encoder", f"{LENS}, its own encoder", metrics, metrics)
    others = [
        compared(name, name.replace("_", " "), meaning, code[name], {})
        for name, meaning in READERS.items()
        if name in code
    ]
    return [own, *others]


def best_of_n(metrics: Mapping[str, Any]) -> list[BestOf]:
    rows = metrics.get("best_of_n", {}).items()
    return [BestOf(n=int(count), fve=of["fve"], kl_recovered=of["kl_recovered"]) for count, of in rows]


def text_length(metrics: Mapping[str, Any]) -> list[ReadInPart]:
    """Of the lens's text from either end, and of the context; empty where that was not looked at."""
    found = metrics.get("text_length")
    if not found:
        return []
    return [
        ReadInPart(
            label=meaning.removeprefix("the "),
            tokens=found["tokens"],
            fve=found[part]["fve"],
            kl_recovered=found[part]["kl_recovered"],
            intervals=found[part]["fve_ci95"],
            kl_intervals=found[part]["kl_recovered_ci95"],
        )
        for part, meaning in PARTS.items()
    ]


def linear_probe(metrics: Mapping[str, Any]) -> list[Probed]:
    probe = metrics.get("linear_probe")
    if not probe:
        return []
    columns = (probe[name] for name in ("probe_accuracy", "named_by_text", "named_by_shuffled_text"))
    return [
        Probed(offset=offset, probe=accuracy, text=text, shuffled=shuffled)
        for offset, (accuracy, text, shuffled) in enumerate(zip(*columns, strict=True))
    ]


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """The tables of the checks that were made, as the terminal and the cards have them."""
    return [
        Table(title=table.title, columns=list(table.columns), rows=[list(row) for row in table.rows])
        for table in check_tables(metrics)
    ]


def verdict(compared: list[Compared]) -> dict[str, list[str]]:
    """The controls by how the lens stands to them: `above`, `level` where the intervals overlap, `below`."""
    if not compared:
        return {}
    lens, *controls = compared
    low, high = lens["interval"] or (lens["fve"], lens["fve"])
    found: dict[str, list[str]] = {"above": [], "level": [], "below": []}
    for control in sorted(controls, key=lambda of: of["fve"], reverse=True):
        control_low, control_high = control["interval"] or (control["fve"], control["fve"])
        side = "above" if low > control_high else "below" if high < control_low else "level"
        found[side].append(control["label"])
    return found


def compared(
    name: str, label: str, meaning: str, values: Mapping[str, Any], metrics: Mapping[str, Any], prefix: str = ""
) -> Compared:
    """`prefix` is what the intervals' names in `metrics` begin with."""
    return Compared(
        name=name,
        label=label,
        meaning=meaning,
        fve=values["fve"],
        kl_recovered=values.get("kl_recovered"),
        interval=interval_of(metrics, f"{prefix}fve"),
        kl_interval=interval_of(metrics, f"{prefix}kl_recovered"),
    )


def interval_of(metrics: Mapping[str, Any], name: str) -> list[float] | None:
    ends = metrics.get("ci95", {}).get(name)
    return None if ends is None else list(ends)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
