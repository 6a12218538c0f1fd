"""Charts as data: what is drawn, under which labels. `static` draws them with matplotlib, `interactive` with plotly.

Lines are told apart by colour, dash and marker at once; the colours are those of Okabe and Ito (2008), which stay
apart for the colour-blind, without their yellow, which is not seen on white.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# A matplotlib.figure.Figure, or a plotly.graph_objects.Figure where `interactive` is asked for.
AnyFigure = Any
Interval = Sequence[float]  # low, high
GREY = "#666666"
MIDDOT = " · "


class Style(NamedTuple):
    """How a line is drawn."""

    colour: str
    line: str
    """As matplotlib writes it."""
    marker: str
    """Likewise."""


STYLES = (
    Style("#0072B2", "-", "o"),
    Style("#D55E00", "--", "s"),
    Style("#009E73", "-.", "^"),
    Style("#CC79A7", ":", "D"),
    Style("#E69F00", "-", "v"),
    Style("#56B4E9", "--", "P"),
    Style("#000000", "-.", "X"),
)


@dataclass(frozen=True)
class Line:
    """Values y at x, with the ends of a band around each where there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[Interval] | None = None
    style: Style | None = None
    """None for that of its place among the lines."""


class Mark(NamedTuple):
    """Where on the x axis something begins."""

    label: str
    x: float


@dataclass(frozen=True)
class Lines:
    """Axes with lines."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    x_scale: str = "linear"
    """Or log, to the base 2."""
    y_scale: str = "linear"
    """Or log, to the base 10."""
    ticks: Sequence[float] | None = None
    """Of the x axis."""
    levels: Sequence[tuple[str, float]] = ()
    """Values to compare with, each a horizontal line with its label."""
    markers: bool = True
    x_domain: tuple[float, float] | None = None
    floor: float | None = None
    """Where the y axis begins."""


@dataclass(frozen=True)
class Dot:
    """A row of `Dots`."""

    label: str
    value: float
    interval: Interval | None = None
    strong: bool = False
    """Whether it is the one that the others are compared with."""


@dataclass(frozen=True)
class Dots:
    """Values with their intervals, one row each from above."""

    title: str
    x_label: str
    rows: Sequence[Dot]
    domain: tuple[float, float] | None = None
    """Of the axis; a value below it is named at the edge."""
    decimals: int = 3
    zero: bool = False
    """Whether 0 is marked."""


@dataclass(frozen=True)
class Chart:
    """A figure."""

    title: str
    panels: Sequence[Lines | Dots]
    note: str = ""
    """What lines and bands are, and of what; below the panels."""
    columns: int | None = None


def style_of(line: Line, place: int) -> Style:
    return line.style or STYLES[place % len(STYLES)]


def num_columns(chart: Chart) -> int:
    """Panels side by side: up to three, and an even grid of four."""
    return chart.columns or {4: 2}.get(len(chart.panels), min(3, len(chart.panels)))


def has_common_legend(chart: Chart) -> bool:
    """Whether all panels have the same lines."""
    lines = {tuple(line.label for line in of.lines) for of in chart.panels if isinstance(of, Lines)}
    return len(lines) == 1 and all(isinstance(of, Lines) for of in chart.panels)


def repeats_labels(chart: Chart, place: int) -> bool:
    """Whether the rows of a panel are named by the panel to its left."""
    panel = chart.panels[place]
    before = chart.panels[place - 1] if place % num_columns(chart) else None
    same = isinstance(panel, Dots) and isinstance(before, Dots)
    return same and [row.label for row in panel.rows] == [row.label for row in before.rows]  # type: ignore[union-attr]


class PlacedDot(NamedTuple):
    """A row of `Dots` as it is drawn."""

    row: Dot
    x: float
    text: str
    """Its value, or where that lies outside, what stands at the edge."""
    is_outside: bool
    is_bold: bool
    """Whether it stands out among rows that it is compared with."""
    colour: str


def placed_dots(panel: Dots) -> list[PlacedDot]:
    """The rows of a panel; those below its domain at its edge."""
    low, _ = domain_of(panel)
    are_compared = not all(row.strong for row in panel.rows)
    placed = []
    for row in panel.rows:
        value, is_outside = f"{row.value:.{panel.decimals}f}".replace("-", "−"), row.value < low
        placed.append(
            PlacedDot(
                row,
                x=max(row.value, low),
                text=f"◂ {value}" if is_outside else value,
                is_outside=is_outside,
                is_bold=row.strong and are_compared,
                colour=STYLES[0].colour if row.strong else GREY,
            )
        )
    return placed


def domain_of(panel: Dots) -> tuple[float, float]:
    """That of the panel, or from the lowest to the highest value or end of an interval, with room at either end."""
    if panel.domain is not None:
        return panel.domain
    ends = [end for row in panel.rows for end in (row.value, *(row.interval or ()))]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 0.5
    return (min(0.0, low - room) if panel.zero else low - room), high + room


class PlacedMark(NamedTuple):
    """A mark whose label does not cover another's."""

    label: str
    x: float
    row: int
    """Of the label above the axes, 0 being the lowest."""
    is_left: bool
    """Whether the label ends at the mark, since it would run out of the axes to the right."""


def placed_marks(panel: Lines, character: float) -> list[PlacedMark]:
    """The labels of marks in as few rows as they fit into.

    Args:
        panel: on a linear axis.
        character: width of one, as a share of the axis.
    """
    ends = [x for line in panel.lines for x in line.x] + [mark.x for mark in panel.marks]
    low, high = min(ends), max(ends)
    rows: list[list[tuple[float, float]]] = []
    placed = []
    for mark in panel.marks:
        at, width = (mark.x - low) / ((high - low) or 1), character * len(mark.label)
        is_left = at + width > 1 and at >= width
        span = (at - width, at) if is_left else (at, at + width)
        free = (row for row, spans in enumerate(rows) if not any(crosses(span, other) for other in spans))
        row = next(free, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(span)
        placed.append(PlacedMark(mark.label, mark.x, row, is_left))
    return placed


def crosses(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return first[0] < second[1] and second[0] < first[1]
