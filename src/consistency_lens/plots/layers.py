"""Plots of tuned lenses: against depth, and tokens by layers. The static ones are those of `tuned-lens plot`."""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..tuned_lens.heatmap import QUANTITIES, Quantity, grid_of, heatmap_figure, prompt_ids, value_of, visible
from ..tuned_lens.lens_places import is_own
from ..tuned_lens.plots import (
    CALIBRATED,
    GAIN_PERCENTILES,
    LAYER_LABEL,
    LENSES,
    OVER_POSITIONS,
    LensRecords,
    LensStyle,
    cos_figure,
    delta_kl_figure,
    has_answers,
    kl_figure,
    kl_gains,
    overview_figure,
    percentiles_by_layer,
    rank_figure,
    stacked,
)
from ..tuned_lens.readings import TUNED
from ..tuned_lens.sweep_figures import calibrated_kl, find_sweep, read_run, read_sweep
from .chart import AnyFigure, Chart, Line, Lines, Style
from .drawing import drawn
from .interactive import new_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

Against = Literal["all", "kl", "rank", "cos", "gain"]
KL_TITLE = "KL to the final prediction"
BITS = 1 / log(2)  # in a nat
TOP = 8  # tokens that are listed where a cell is pointed at
CELL, AROUND = 34, 190  # pixels
COLUMNS = {"kl": "kl_from_final_bits", "rank": "answer_rank", "cos": "cos_to_final"}


class Sweep(NamedTuple):
    """The records of a sweep, with what its run says besides."""

    records: LensRecords
    calibrated: list[float] | None
    title: str


def depth(
    sweep: str | Path | LensRecords, quantity: Against = "all", title: str | None = None, interactive: bool = False
) -> AnyFigure:
    """What the norm lens and the tuned lens read, against depth: `kl`, the KL to the model's own prediction in bits;
    `rank` of the answer; `cos`, the cosine to the final logits; `gain`, the norm lens's KL less the tuned lens's in
    bits; or `all` of them. Lines are medians.

    Args:
        sweep: folder or prefix of what `tuned-lens sweep` wrote, its records, or the folder of a fitted tuned lens, of
            which there is the mean KL on held-out text.
        quantity: one of these.
        title: above the figure; the model's name if None.
        interactive: a plotly figure in place of one of matplotlib.

    Raises:
        ValueError: if there is no such sweep, it lacks the quantity, or the library is not installed.
    """
    if quantity not in (known := ("all", *DRAWN)):
        raise ValueError(f"depth: quantity must be one of {', '.join(known)}, got {quantity!r}")
    if isinstance(sweep, str | Path) and is_own(Path(sweep)):
        return drawn(chart_of_fit(Path(sweep), quantity, title), interactive)
    records, calibrated, name = opened(sweep)
    heading = name if title is None else title
    if quantity == "rank" and not has_answers(records):
        raise ValueError("depth: rank: no prompt of these records has an answer; sweep prompts with answers")
    if interactive:
        wanted = [of for of in DRAWN if can_be_drawn(of, records)] if quantity == "all" else [quantity]
        return drawn(Chart(heading, [panel(of, records, calibrated) for of in wanted], OVER_POSITIONS), True)
    if quantity == "all":
        return overview_figure(records, heading, calibrated)
    return kl_figure(records, heading, calibrated) if quantity == "kl" else DRAWN[quantity](records, heading)


# quantity -> its figure
DRAWN: Mapping[str, Callable[[LensRecords, str], Any]] = {
    "kl": kl_figure, "rank": rank_figure, "cos": cos_figure, "gain": delta_kl_figure,
}  # fmt: skip


def can_be_drawn(quantity: str, records: LensRecords) -> bool:
    return {"rank": has_answers(records), "gain": TUNED in records}.get(quantity, True)


def opened(sweep: str | Path | LensRecords) -> Sweep:
    """The records of a sweep, read if they are not."""
    if not isinstance(sweep, str | Path):
        return Sweep(sweep, None, "")
    files = find_sweep(Path(sweep))
    run = read_run(files)
    return Sweep(read_sweep(files), calibrated_kl(run), run.get("model_id") or files.name)


def panel(quantity: str, records: LensRecords, calibrated: Sequence[float] | None) -> Lines:
    """A quantity as lines with their middle half."""
    if quantity == "gain":
        layers, values = stacked(kl_gains(records), GAIN_PERCENTILES)
        line = line_of(LENSES[TUNED], layers.tolist(), values[2].tolist(), values[[1, 3]].T.tolist())
        return Lines("Gain of the tuned lens", LAYER_LABEL, "KL norm − KL tuned, bits", [line])
    titles = {
        "kl": (KL_TITLE, QUANTITIES["kl"]),
        "rank": ("Rank of the answer, over prompts", "rank (1 = top)"),
        "cos": ("Cosine to the final logits", "cosine"),
    }
    lines = []
    for name, of in records.items():
        layers, values = percentiles_by_layer(of, COLUMNS[quantity])
        lines.append(line_of(LENSES[name], layers.tolist(), values[1].tolist(), values[[0, 2]].T.tolist()))
    if quantity == "kl" and calibrated is not None:
        lines.append(line_of(CALIBRATED, list(range(len(calibrated))), calibrated))
    title, y_label = titles[quantity]
    floor, scale = 0 if quantity == "kl" else None, "log" if quantity == "rank" else "linear"
    return Lines(title, LAYER_LABEL, y_label, lines, y_scale=scale, floor=floor)


def line_of(style: LensStyle, x: Sequence[float], y: Sequence[float], band: Any = None) -> Line:
    return Line(style.label, x, y, band, Style(style.colour, style.line, style.marker))


def chart_of_fit(folder: Path, quantity: str, title: str | None) -> Chart:
    """The mean KL on held-out text, from what a fit leaves beside its lens."""
    path = folder / "metrics.json"
    if quantity not in ("all", "kl") or not path.is_file():
        raise ValueError(
            f"depth: a fit leaves the KL alone, in {str(path)!r}; pass the folder of a sweep, or fit again"
        )
    metrics = json.loads(path.read_text(encoding="utf-8"))
    styles = {"norm": LENSES["norm"], "calibrated": CALIBRATED, "tuned": LENSES[TUNED]}
    lines = [
        line_of(style, list(range(len(metrics["kl"][name]))), [BITS * kl for kl in metrics["kl"][name]])
        for name, style in styles.items()
        if name in metrics["kl"]
    ]
    layers = sorted({x for line in lines for x in line.x})
    note = f"means over {metrics['positions']:,} positions of held-out text; the last layer is the model itself"
    axes = Lines(KL_TITLE, LAYER_LABEL, QUANTITIES["kl"], lines, ticks=layers, floor=0)
    return Chart(folder.resolve().name if title is None else title, [axes], note)


def heatmap(
    sweep: str | Path | LensRecords,
    prompt: str | None = None,
    quantity: Quantity = "kl",
    title: str | None = None,
    interactive: bool = False,
) -> AnyFigure:
    """Tokens from left to right, layers from below, one panel a lens: in each cell what the lens puts first, coloured
    by `kl` to the final prediction or `entropy`, in bits, or by the `probability` of the top token.

    Args:
        sweep: folder or prefix of what `tuned-lens sweep` wrote, or its records.
        prompt: its id; the first if None.
        quantity: what the cells are coloured by.
        title: above the figure; the model's name and the prompt if None.
        interactive: a plotly figure, whose cells open to the likeliest tokens, in place of one of matplotlib.

    Raises:
        ValueError: if there is no such sweep, prompt or quantity, or the library is not installed.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"heatmap: quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    records, _, name = opened(sweep)
    prompt = prompt_ids(next(iter(records.values())))[0] if prompt is None else prompt
    heading = ", ".join(filter(None, (name, f"prompt {prompt}"))) if title is None else title
    if not interactive:
        return heatmap_figure(records, prompt, quantity, heading)
    return interactive_heatmap(records, prompt, quantity, heading)


def interactive_heatmap(records: LensRecords, prompt: str, quantity: Quantity, title: str) -> "PlotlyFigure":
    grids = {name: grid_of(of, prompt) for name, of in records.items()}
    figure = new_figure(
        title, QUANTITIES[quantity], rows=len(grids), cols=1, subplot_titles=[LENSES[name].label for name in grids],
        vertical_spacing=0.36 / len(grids),
    )  # fmt: skip
    for row, grid in enumerate(grids.values(), start=1):
        tokens = [escape(visible(record.token)) for record in grid[0]]
        figure.add_heatmap(
            z=[[value_of(record, quantity) for record in line] for line in grid],
            text=[[top_of(record) for record in line] for line in grid],
            customdata=[[described(record) for record in line] for line in grid],
            texttemplate="%{text}", hovertemplate="%{customdata}<extra></extra>", coloraxis="coloraxis",
            y=[line[0].layer for line in grid], xgap=1, ygap=1, row=row, col=1,
        )  # fmt: skip
        figure.update_xaxes(tickvals=list(range(len(tokens))), ticktext=tokens, title="token read", row=row, col=1)
        figure.update_yaxes(title="layer", dtick=1, row=row, col=1)
    layers = len(next(iter(grids.values())))
    figure.update_coloraxes(
        colorscale="Blues", colorbar_title={"text": QUANTITIES[quantity], "side": "right"}, cmin=0,
        cmax=1 if quantity == "probability" else None,
    )  # fmt: skip
    figure.update_layout(height=len(grids) * (CELL * layers + AROUND) + 80)
    return figure


def top_of(record: Any) -> str:
    """What a cell says, as plotly's HTML: bold where it is the answer."""
    text = escape(visible(record.top20[0][1]))
    return f"<b>{text}</b>" if record.is_answer else text


def described(record: Any) -> str:
    """What a cell says where it is pointed at, as plotly's HTML."""
    tops = [f"{escape(visible(token))} {probability:.1%}" for _, token, probability in record.top20[:TOP]]
    rank = "" if record.answer_rank is None else f"<br>rank of the answer {record.answer_rank:,}"
    return (
        f"<b>layer {record.layer} after “{escape(visible(record.token))}”</b><br>KL {record.kl_from_final_bits:.2f} "
        f"bits, entropy {record.entropy_bits:.2f} bits{rank}<br>" + "<br>".join(tops)
    )
