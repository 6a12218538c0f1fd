"""Charts drawn with plotly, to point at and to zoom; a figure's `write_html` makes a page of it."""

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from ..optional_packages import require
from .chart import (
    GREY,
    Chart,
    Dots,
    Line,
    Lines,
    PlacedMark,
    domain_of,
    has_common_legend,
    num_columns,
    placed_dots,
    placed_marks,
    repeats_labels,
    style_of,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
PANEL_HEIGHT, ROW, AROUND_ROWS = 380, 30, 120  # pixels
CHARACTER, MARK_ROW = 6.5, 15  # pixels, of the labels of marks
COLUMN = 280  # pixels, about what a panel of a window is wide


def draw(chart: Chart) -> "Figure":
    """The chart as a plotly figure.

    Raises:
        ValueError: if plotly is not installed.
    """
    columns = num_columns(chart)
    rows = -(-len(chart.panels) // columns)
    figure = new_figure(
        chart.title, chart.note, rows=rows, cols=columns, subplot_titles=[escape(of.title) for of in chart.panels],
        vertical_spacing=0.28 / rows, horizontal_spacing=0.22 / columns,
    )  # fmt: skip
    over = MARK_ROW * (1 + max((m.row for of in chart.panels for m in marks_of(of)), default=-1))
    figure.update_annotations(yshift=over)  # the panels' titles, above the labels of marks
    named: set[str] = set()
    for index, panel in enumerate(chart.panels):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        if isinstance(panel, Lines):
            draw_lines(figure, panel, place, named, is_one_of_many=not has_common_legend(chart))
        else:
            draw_dots(figure, panel, place, is_named=not repeats_labels(chart, index))
    dots = max((len(panel.rows) for panel in chart.panels if isinstance(panel, Dots)), default=0)
    figure.update_layout(height=rows * (ROW * dots + AROUND_ROWS if dots else PANEL_HEIGHT) + 130)
    return figure


def new_figure(title: str, note: str = "", **subplots: Any) -> "Figure":
    """A figure with subplots on a white ground. Text is shown as it is: plotly would take some of it for HTML.

    Raises:
        ValueError: if plotly is not installed.
    """
    require("plotly", extra="plots", needed_for="an interactive figure")
    from plotly.subplots import make_subplots

    figure = make_subplots(**subplots)
    figure.update_layout(
        template="plotly_white", font={"size": 14, "color": "#15181c"}, margin={"t": 130},
        title={"text": escape(title), "subtitle": {"text": escape(note)}, "yref": "container", "y": 0.97},
        title_yanchor="top",
        hoverlabel={"align": "left"},
    )  # fmt: skip
    return figure


def marks_of(panel: Lines | Dots) -> list[PlacedMark]:
    return placed_marks(panel, CHARACTER / COLUMN) if isinstance(panel, Lines) else []


def draw_lines(
    figure: "Figure", panel: Lines, place: Mapping[str, int], named: set[str], is_one_of_many: bool
) -> None:
    """Lines, bands, marks and levels.

    Args:
        named: labels that the legend has; grows. Lines of one label in two panels are one entry.
        is_one_of_many: whether the legend has a group for each panel.
    """
    for index, line in enumerate(panel.lines):
        group = f"{panel.title}: {line.label}" if is_one_of_many else line.label
        draw_line(figure, panel, line, index, place, group=group, is_new=group not in named)
        if is_one_of_many and index == 0:
            figure.update_traces(
                {"legendgrouptitle": {"text": escape(panel.title)}}, selector={"legendgroup": group}, **place
            )
        named.add(group)
    for label, value in panel.levels:
        x = sorted(x for line in panel.lines for x in line.x)
        figure.add_scatter(
            x=[x[0], x[-1]], y=[value, value], mode="lines", line={"color": GREY, "dash": "dot"}, legendgroup=label,
            name=escape(label), showlegend=label not in named, hovertemplate="%{y:.3f}", **place,
        )  # fmt: skip
        named.add(label)
    for mark in marks_of(panel):
        figure.add_vline(mark.x, line={"color": GREY, "dash": "dash", "width": 1}, **place)
        figure.add_annotation(
            x=mark.x, y=1, yref="y domain", text=escape(mark.label), showarrow=False, yanchor="bottom",
            xanchor="right" if mark.is_left else "left", font={"size": 12, "color": GREY},
            yshift=MARK_ROW * mark.row, **place,
        )  # fmt: skip
    figure.update_xaxes(title=escape(panel.x_label), **place)
    figure.update_yaxes(title=escape(panel.y_label), type=panel.y_scale, **place)
    if panel.x_domain is not None:
        figure.update_xaxes(range=list(panel.x_domain), **place)
    if panel.floor is not None:
        figure.update_yaxes(range=[panel.floor, None], **place)
    if panel.x_scale == "log":
        figure.update_xaxes(type="log", **place)
    if panel.ticks is not None:
        figure.update_xaxes(tickvals=list(panel.ticks), ticktext=[f"{tick:g}" for tick in panel.ticks], **place)


def draw_line(
    figure: "Figure", panel: Lines, line: Line, index: int, place: Mapping[str, int], group: str, is_new: bool
) -> None:
    style = style_of(line, index)
    name, hover = escape(line.label), f"{escape(panel.x_label)} %{{x}}: %{{y:.3f}}"
    if line.band is not None:
        low, high = zip(*line.band, strict=True)
        figure.add_scatter(
            x=[*line.x, *line.x[::-1]], y=[*low, *high[::-1]], fill="toself", fillcolor=style.colour, opacity=0.18,
            line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False, legendgroup=group, **place,
        )  # fmt: skip
        hover += " (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
    figure.add_scatter(
        x=line.x, y=line.y, customdata=line.band, name=name, legendgroup=group, showlegend=is_new,
        mode="lines+markers" if panel.markers else "lines", line={"color": style.colour, "dash": DASHES[style.line]},
        marker={"symbol": SYMBOLS.get(style.marker, "x"), "size": 8}, hovertemplate=f"{hover}<extra>{name}</extra>",
        **place,
    )  # fmt: skip


def draw_dots(figure: "Figure", panel: Dots, place: Mapping[str, int], is_named: bool) -> None:
    """One row a value, from above; the value stands over it. `is_named` is whether the rows have their labels."""
    placed = placed_dots(panel)
    names = [f"<b>{escape(dot.row.label)}</b>" if dot.is_bold else escape(dot.row.label) for dot in placed]
    for name, dot in zip(names, placed, strict=True):
        value = f"{dot.row.value:.{panel.decimals}f}"
        low, high = (dot.row.value, dot.row.value) if dot.is_outside else dot.row.interval or (dot.x, dot.x)
        span = "" if low == high else f" ({low:.{panel.decimals}f} to {high:.{panel.decimals}f})"
        figure.add_scatter(
            x=[dot.x], y=[name], mode="text" if dot.is_outside else "markers+text", text=[dot.text],
            textposition="middle right" if dot.is_outside else "top center", showlegend=False, cliponaxis=False,
            marker={"color": dot.colour, "size": 8}, textfont={"size": 12},
            error_x={"array": [high - dot.row.value], "arrayminus": [dot.row.value - low], "width": 5},
            hovertemplate=f"{name}: {value}{span}<extra></extra>", **place,
        )  # fmt: skip
    figure.update_yaxes(
        categoryorder="array", categoryarray=names, range=[len(names) - 0.4, -0.9], showticklabels=is_named, **place
    )
    low, high = domain_of(panel)
    figure.update_xaxes(
        title=escape(panel.x_label), range=[low, high], nticks=6, zeroline=panel.zero, zerolinecolor="black",
        zerolinewidth=1, **place,
    )  # fmt: skip
