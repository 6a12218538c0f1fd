"""Figures of a sweep against depth: KL, the answer's rank, cosine, and what the tuned lens gains."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..optional_packages import require
from .depth import DEPTHS, layer_at_depth
from .gates import LEAST_DELTA_BITS, WORST_DELTA_BITS
from .kpis import RANKS
from .readings import NORM, TUNED
from .records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase


# Records of each lens, under the name that their column `lens` has.
LensRecords = Mapping[str, Sequence[Record]]


class LensStyle(NamedTuple):
    """How one lens is drawn; colours that stay apart for the colour-blind (Okabe and Ito 2008)."""

    label: str
    colour: str
    line: str
    marker: str


LENSES = {
    NORM: LensStyle("norm lens", "#D55E00", "--", "s"),
    TUNED: LensStyle("tuned lens", "#0072B2", "-", "o"),
}
CALIBRATED = LensStyle("norm lens, calibrated", "#AA4499", ":", "^")
QUARTILES = (25, 50, 75)
GAIN_PERCENTILES = (10, 25, 50, 75, 90)
MARKED_LAYERS = 24  # with more, the markers of a line run together
SIZE, OVERVIEW_SIZE = (7.2, 4.6), (13.5, 9.2)  # inches
GREY, RED = "#666666", "#CC3311"
LAYER_LABEL = "layer (output of block, counted from 0)"
KL_LABEL = r"KL$(P_{\mathrm{final}}\,\Vert\,P_{\mathrm{layer}})$, bits"
OVER_POSITIONS = "line: median over all positions; band: their middle half"
OVER_PROMPTS = "line: median over prompts; band: their middle half"


def kl_figure(records: LensRecords, title: str = "", calibrated: Sequence[float] | None = None) -> "Figure":
    """KL(P_final || P_layer) in bits against depth, over all positions of all prompts, and above it the layers where
    the answer first comes into the top 10, 5 and 1 (see `median_crossing`).

    Args:
        records: of each lens.
        title: above the figure.
        calibrated: median KL of the norm lens at its own fitted temperatures, (L,) bits, which is in no records.
    """
    figure = new_figure(SIZE, title)
    draw_kl(figure, records, calibrated)
    return figure


def rank_figure(records: LensRecords, title: str = "") -> "Figure":
    """Rank of the answer at the prompts' last positions against depth.

    Raises:
        ValueError: if no prompt has an answer.
    """
    if not has_answers(records):
        raise ValueError("rank_figure: no prompt of these records has an answer; sweep prompts with answers")
    figure = new_figure(SIZE, title)
    draw_rank(figure, records)
    return figure


def cos_figure(records: LensRecords, title: str = "") -> "Figure":
    """Cosine to the final prediction (`cos_to_final`) against depth, over all positions of all prompts."""
    figure = new_figure(SIZE, title)
    draw_cos(figure, records)
    return figure


def delta_kl_figure(records: LensRecords, title: str = "") -> "Figure":
    """Percentiles over positions of KL_norm - KL_tuned in bits against depth, with the thresholds of gates A and D.

    Raises:
        ValueError: if one of the two lenses is missing, or they were swept over different positions.
    """
    figure = new_figure(SIZE, title)
    draw_delta_kl(figure, records)
    return figure


def overview_figure(records: LensRecords, title: str = "", calibrated: Sequence[float] | None = None) -> "Figure":
    """All four in one, with the arguments of `kl_figure`; where the records lack what one of them shows, a note stands
    in its place."""
    figure = new_figure(OVERVIEW_SIZE, title)
    panels: Any = figure.subfigures(2, 2, wspace=0.03, hspace=0.03)
    draw_kl(panels[0, 0], records, calibrated)
    draw_cos(panels[1, 0], records)
    if has_answers(records):
        draw_rank(panels[0, 1], records)
    else:
        draw_note(panels[0, 1], "no prompt has an answer")
    if {NORM, TUNED} <= records.keys():
        draw_delta_kl(panels[1, 1], records)
    else:
        draw_note(panels[1, 1], f"records of the {' and '.join(LENSES[name].label for name in records)} alone")
    return figure


def median_crossing(records: Sequence[Record], rank: int) -> float | None:
    """The median over prompts of the first layer where the answer's rank is at most `rank`, which is 10, 5 or 1.

    A prompt whose answer never gets there counts as later than all layers.

    Returns:
        None if that is so for half of the prompts, or no prompt has an answer.
    """
    first = {r.prompt_id: getattr(r, f"first_rank_le_{rank}") for r in records if r.answer_rank is not None}
    layers = [np.inf if layer is None else layer for layer in first.values()]
    median = float(np.median(layers)) if layers else np.inf
    return median if np.isfinite(median) else None


def percentiles_by_layer(
    records: Sequence[Record], column: str, percentiles: Sequence[int] = QUARTILES
) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of a column over the records of each layer that have it.

    Returns:
        layers (L,) and values (len(percentiles), L).
    """
    values = defaultdict(list)
    for record in records:
        value = getattr(record, column)
        if value is not None:
            values[record.layer].append(value)
    return stacked(values, percentiles)


def kl_gains(records: LensRecords) -> dict[int, list[float]]:
    """KL_norm - KL_tuned in bits at each position, by layer.

    Raises:
        ValueError: see `delta_kl_figure`.
    """
    missing = [name for name in (NORM, TUNED) if name not in records]
    if missing:
        raise ValueError(f"delta_kl: no records of the {LENSES[missing[0]].label}; sweep with both lenses")
    norm, tuned = (
        {(r.prompt_id, r.layer, r.position): r.kl_from_final_bits for r in records[name]} for name in (NORM, TUNED)
    )
    if norm.keys() != tuned.keys():
        prompt, layer, position = min(norm.keys() ^ tuned.keys())
        raise ValueError(
            f"delta_kl: prompt {prompt!r}, layer {layer}, position {position} is in the records of one lens alone; "
            "sweep both lenses over the same prompts"
        )
    gains = defaultdict(list)
    for (prompt, layer, position), kl in norm.items():
        gains[layer].append(kl - tuned[prompt, layer, position])
    return gains


def stacked(values: Mapping[int, Sequence[float]], percentiles: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    layers = np.array(sorted(values))
    return layers, np.array([np.percentile(values[layer], percentiles) for layer in layers]).T


def has_answers(records: LensRecords) -> bool:
    return any(record.answer_rank is not None for of in records.values() for record in of)


def new_figure(size: tuple[float, float], title: str) -> "Figure":
    """An empty figure of a size in inches, see `NotebookFigure`.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    require("matplotlib", extra="plots", needed_for="a figure")
    from ..notebook_figure import NotebookFigure

    return NotebookFigure(size, title)


def draw_kl(figure: "FigureBase", records: LensRecords, calibrated: Sequence[float] | None) -> None:
    """The KL of each lens, and above it the crossings in a strip of their own, where nothing can cover them."""
    if has_answers(records):
        strip, main = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.2))
        draw_crossings(
            strip, main, {name: [median_crossing(of, rank) for rank in RANKS] for name, of in records.items()}
        )
    else:
        strip = main = figure.subplots()
    draw_lines(main, records, "kl_from_final_bits")
    if calibrated is not None:
        draw_line(main, CALIBRATED, np.arange(len(calibrated)), np.array(calibrated))
    main.set_ylabel(KL_LABEL)
    main.set_ylim(bottom=0)
    finish(figure, main, strip, "How far each layer's reading is from the model's prediction", OVER_POSITIONS)


def draw_crossings(strip: "Axes", main: "Axes", crossings: Mapping[str, Sequence[float | None]]) -> None:
    """One row a milestone, one mark a lens; a line of its colour goes down into the axes below."""
    for shift, (name, layers) in zip(spread(len(crossings)), crossings.items(), strict=True):
        style = LENSES[name]
        for row, layer in enumerate(layers):
            if layer is not None:
                strip.plot(layer, row + shift, style.marker, color=style.colour, markersize=6, clip_on=False)
                main.axvline(layer, color=style.colour, linestyle=style.line, linewidth=0.8, alpha=0.45, zorder=0)
    strip.set_yticks(range(len(RANKS)), [f"answer in top {rank}" for rank in RANKS])
    strip.set_ylim(len(RANKS) - 0.5, -0.5)
    strip.tick_params(axis="y", length=0)
    strip.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    for row, marks in enumerate(zip(*crossings.values(), strict=True)):
        if all(layer is None for layer in marks):
            strip.annotate(
                "not in most of the prompts", (0.5, row), xycoords=("axes fraction", "data"),
                ha="center", va="center", color=GREY, fontsize="small", bbox={"color": "white", "pad": 1},
            )  # fmt: skip


def draw_rank(figure: "FigureBase", records: LensRecords) -> None:
    from matplotlib.ticker import FuncFormatter

    axes = figure.subplots()
    draw_lines(axes, records, "answer_rank")
    axes.set_yscale("log")
    axes.set_ylim(0.8, max(12.0, axes.get_ylim()[1]))  # at least one decade, or no tick has a label
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    axes.set_ylabel("rank of the answer (1 = top)")
    finish(figure, axes, axes, "Where the answer stands, at the prompts' last tokens", OVER_PROMPTS)


def draw_cos(figure: "FigureBase", records: LensRecords) -> None:
    axes = figure.subplots()
    draw_lines(axes, records, "cos_to_final")
    axes.set_ylabel("cosine to the final logits")
    finish(figure, axes, axes, "The direction of each layer's reading", OVER_POSITIONS)


def draw_delta_kl(figure: "FigureBase", records: LensRecords) -> None:
    """Median and bands of the gain; the thresholds stand at the gates' layers, named on the upper edge."""
    layers, (low, first, median, third, high) = stacked(kl_gains(records), GAIN_PERCENTILES)
    axes = figure.subplots()
    colour = LENSES[TUNED].colour
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0, label="10th to 90th percentile")
    axes.fill_between(layers, first, third, color=colour, alpha=0.3, linewidth=0, label="25th to 75th")
    draw_line(axes, LENSES[TUNED], layers, median, label="median")
    axes.axhline(0, color="black", linewidth=0.8)
    depths = [layer_at_depth(percent, int(layers[-1]) + 1) for percent in DEPTHS]
    gates = (
        (LEAST_DELTA_BITS, "black", "gate A: median at least"),
        (WORST_DELTA_BITS, RED, "gate D: never below"),
    )
    for bits, mark_colour, label in gates:
        thresholds = np.broadcast_to(bits, len(depths))
        axes.plot(depths, thresholds, "_", color=mark_colour, markersize=14, markeredgewidth=2, label=label)
    at_layer = defaultdict(list)
    for percent, layer in zip(DEPTHS, depths, strict=True):
        at_layer[layer].append(str(percent))
        axes.axvline(layer, color=GREY, linewidth=0.6, linestyle=":", zorder=0)
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(list(at_layer), [f"{', '.join(percents)}% depth" for percents in at_layer.values()])
    axes.set_ylabel(r"KL$_{\mathrm{norm}}$ − KL$_{\mathrm{tuned}}$, bits")
    finish(figure, axes, axes, "What the tuned lens gains over the norm lens")


def draw_note(figure: "FigureBase", text: str) -> None:
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY)


def draw_lines(axes: "Axes", records: LensRecords, column: str) -> None:
    """One median line with a band between the quartiles for each lens."""
    for name, of in records.items():
        layers, (first, median, third) = percentiles_by_layer(of, column)
        axes.fill_between(layers, first, third, color=LENSES[name].colour, alpha=0.18, linewidth=0)
        draw_line(axes, LENSES[name], layers, median)


def draw_line(
    axes: "Axes", style: LensStyle, layers: np.ndarray, values: np.ndarray, label: str | None = None
) -> None:
    """A line in a lens's style, with markers where they do not run together."""
    marker = style.marker if len(layers) <= MARKED_LAYERS else ""
    axes.plot(
        layers, values, color=style.colour, linestyle=style.line, marker=marker, markersize=4,
        label=label or style.label,
    )  # fmt: skip


def spread(count: int) -> list[float]:
    """Shifts that keep marks of one row apart."""
    return [0.36 * (index - (count - 1) / 2) for index in range(count)]


def finish(figure: "FigureBase", axes: "Axes", top: "Axes", title: str, note: str = "") -> None:
    """What all axes have: a title above the topmost, layers as integers, a grid, and the legend below."""
    from matplotlib.ticker import MaxNLocator

    top.set_title(title, fontsize="medium")
    axes.set_xlabel(LAYER_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.margins(x=0.03)
    for each in {axes, top}:
        each.set_facecolor("white")
        each.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, title=note or None,
        title_fontsize="small",
    )  # fmt: skip
