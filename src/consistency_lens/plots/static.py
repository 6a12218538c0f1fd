"""Charts drawn with matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..optional_packages import require
from .chart import (
    GREY,
    Chart,
    Dots,
    Line,
    Lines,
    domain_of,
    has_common_legend,
    num_columns,
    placed_dots,
    placed_marks,
    repeats_labels,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALONE, PANEL_OF_ROW, PANEL = (7.2, 4.6), (4.6, 4.4), (4.6, 3.6)  # inches, of lines: one, one row of them, more
WIDTH_OF_DOTS, ROW, AROUND_ROWS = 5.2, 0.32, 1.3  # inches
PAD = 0.09  # inches, about each panel
RULE = "#DDDDDD"
CHARACTER = 0.062  # inches, of small text
KEY = 8  # letters
MARK_ROW = 11  # points
BELOW_AXES = 38  # points, of ticks and the axis's label
CROWDED = 24  # points of a line; with more, its markers run together
VALUE_SHARE = 0.12  # of the axis, for the value that stands behind a dot


def draw(chart: Chart) -> "Figure":
    """The chart as a figure that belongs to no window and can be saved, or shown by a notebook.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    require("matplotlib", extra="plots", needed_for="a figure")
    from ..notebook_figure import NotebookFigure

    columns = num_columns(chart)
    rows = -(-len(chart.panels) // columns)
    width, height = size_of(chart)
    figure = NotebookFigure((width * columns, height * rows), chart.title)
    figure.set_layout_engine("constrained", h_pad=PAD, w_pad=PAD)
    grid: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, panel in enumerate(chart.panels):
        if isinstance(panel, Lines):
            draw_lines(grid[place], panel, character=CHARACTER / (width - 1))
        else:
            draw_dots(grid[place], panel, is_named=not repeats_labels(chart, place))
    for axes in grid[len(chart.panels) :]:
        axes.set_axis_off()
    add_legends(figure, chart, grid)
    return figure


def size_of(chart: Chart) -> tuple[float, float]:
    """Inches of one panel."""
    dots = max((len(panel.rows) for panel in chart.panels if isinstance(panel, Dots)), default=0)
    if dots:
        return WIDTH_OF_DOTS, ROW * dots + AROUND_ROWS
    if len(chart.panels) == 1:
        return ALONE
    return PANEL_OF_ROW if len(chart.panels) <= num_columns(chart) else PANEL


def draw_lines(axes: "Axes", panel: Lines, character: float) -> None:
    """Lines, bands, marks and levels; `character` is the width of one as a share of the axes."""
    for place, line in enumerate(panel.lines):
        draw_line(axes, line, place, panel.markers)
    for label, value in panel.levels:
        axes.axhline(value, color=GREY, linestyle=(0, (1, 1.5)), linewidth=1.2, label=label, zorder=0)
    if panel.x_scale == "log":
        axes.set_xscale("log", base=2)
    if panel.y_scale == "log":
        axes.set_yscale("log")
    if panel.ticks is not None:
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.minorticks_off()
    if panel.x_domain is not None:
        axes.set_xlim(*panel.x_domain)
    if panel.floor is not None:
        axes.set_ylim(bottom=panel.floor)
    marks = placed_marks(panel, character)
    for mark in marks:
        axes.axvline(mark.x, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
        axes.annotate(
            mark.label, (mark.x, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
            xytext=(-2 if mark.is_left else 2, 2 + MARK_ROW * mark.row), ha="right" if mark.is_left else "left",
            va="bottom", fontsize="small", color=GREY, parse_math=False, annotation_clip=False,
        )  # fmt: skip
    over = MARK_ROW * (1 + max(mark.row for mark in marks)) if marks else 0
    finish(axes, panel.title, panel.x_label, over)
    axes.set_ylabel(panel.y_label, parse_math=False)
    axes.grid(axis="y", color=RULE, linewidth=0.8)


def draw_line(axes: "Axes", line: Line, place: int, markers: bool) -> None:
    style = style_of(line, place)
    if line.band is not None:
        low, high = zip(*line.band, strict=True)
        axes.fill_between(line.x, low, high, color=style.colour, alpha=0.18, linewidth=0)
    marker = style.marker if markers and len(line.x) <= CROWDED else ""
    axes.plot(
        line.x, line.y, color=style.colour, linestyle=style.line, marker=marker, markersize=5, linewidth=1.8,
        label=line.label,
    )  # fmt: skip


def draw_dots(axes: "Axes", panel: Dots, is_named: bool) -> None:
    """One row a value, from above; the value stands behind it. `is_named` is whether the rows have their labels."""
    from matplotlib.ticker import MaxNLocator

    low, high = domain_of(panel)
    axes.set_xlim(low, high + VALUE_SHARE * (high - low))
    placed = placed_dots(panel)
    for height, dot in enumerate(placed):
        if dot.is_outside:
            axes.text(low, height, f" {dot.text}", va="center", fontsize="small", color=dot.colour)
            continue
        interval = dot.row.interval or (dot.x, dot.x)
        axes.plot(interval, [height, height], color=dot.colour, linewidth=2, marker="|", markersize=9)
        axes.plot(dot.x, height, "o", color=dot.colour, markersize=5)
        axes.annotate(
            dot.text, (interval[1], height), xytext=(7, 0), textcoords="offset points", va="center",
            fontsize="small", weight="bold" if dot.is_bold else "normal", annotation_clip=False,
        )  # fmt: skip
    labels = [row.label if is_named else "" for row in panel.rows]
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    for label, dot in zip(axes.get_yticklabels(), placed, strict=True):
        label.set_fontweight("bold" if dot.is_bold else "normal")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if panel.zero and low < 0:
        axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    finish(axes, panel.title, panel.x_label)


def finish(axes: "Axes", title: str, x_label: str, over: float = 0) -> None:
    """What all axes have; `over` is the height of what stands between the axes and their title, in points."""
    axes.set_title(title, fontsize="medium", pad=6 + over, parse_math=False)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def add_legends(figure: "Figure", chart: Chart, grid: Any) -> None:
    """One legend for all panels that have the same lines, or one below each; the note stands below all."""
    if has_common_legend(chart):
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False, title=chart.note or None,
            title_fontsize="small", ncols=legend_columns(labels, figure.get_figwidth()),
        )  # fmt: skip
        return
    for axes, panel in zip(grid, chart.panels, strict=False):
        if isinstance(panel, Lines):
            legend_below(axes, size_of(chart)[0])
    if chart.note:
        figure.supxlabel(chart.note, fontsize="small", color=GREY, parse_math=False)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """As many as a width in inches has room for, so that rows are about full; a key is as wide as some letters."""
    room = max(1, min(len(labels), int(width / (1.3 * CHARACTER * (KEY + max(map(len, labels)))))))
    return -(-len(labels) // -(-len(labels) // room))


def legend_below(axes: "Axes", width: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    down = ScaledTranslation(0, -BELOW_AXES / 72, axes.figure.dpi_scale_trans)
    labels = axes.get_legend_handles_labels()[1]
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=axes.transAxes + down, frameon=False,
        fontsize="small", ncols=legend_columns(labels, width), borderaxespad=0, columnspacing=1.2,
    )  # fmt: skip
