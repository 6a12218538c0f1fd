"""The plots of a run as files: what `consistency-lens plot` does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ..atomic_write import write_text
from ..optional_packages import require
from ..report.run_folder import read_run
from ..tuned_lens.sweep_figures import Drawn, write_figure
from .chart import AnyFigure
from .runs import best_of_n_texts, controls, fve_against_tokens, token_profiles, training_curves

Format = Literal["png", "svg", "pdf", "html"]
PLOTS_FOLDER, SCRIPT = "plots", "plotly.min.js"
# name of the file -> what draws it
PLOTS: dict[str, Callable[..., AnyFigure]] = {
    "training-curves": training_curves,
    "controls": controls,
    "fve-against-tokens": fve_against_tokens,
    "best-of-n": best_of_n_texts,
    "token-profiles": token_profiles,
}


@dataclass
class PlotArguments:
    """Which run is drawn, and how."""

    run: str = field(default="", metadata={"help": "Folder of the run: the output_dir of a training or evaluation."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder that the plots are written to; default: plots in the run's folder."}
    )
    format: Format = field(
        default="png", metadata={"help": "Format of the plots; html for pages to point at and to zoom, by plotly."}
    )

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run: got none; pass the folder of a run, e.g. plot outputs/tiny_stories")
        if self.format not in get_args(Format):
            raise ValueError(f"format: must be one of {', '.join(get_args(Format))}, got {self.format!r}")


def draw_run(args: PlotArguments) -> Drawn:
    """Writes one file for each plot that the run has the figures for.

    Raises:
        ValueError: if there is no such run, it has none for any, or the library is not installed.
    """
    is_page = args.format == "html"
    require("plotly" if is_page else "matplotlib", extra="plots", needed_for=f"plot --format {args.format}")
    folder = read_run(args.run).path / PLOTS_FOLDER if args.output_dir is None else Path(args.output_dir)
    drawn = Drawn([], [])
    for name, draw in PLOTS.items():
        try:
            figure = draw(args.run, interactive=is_page)
        except ValueError as error:
            drawn.notes.append(f"No {name}: {error}")
            continue
        path = folder / f"{name}.{args.format}"
        drawn.files.append(write_page(path, figure) if is_page else write_figure(path, figure))
    if not drawn.files:
        raise ValueError(f"plot: {args.run!r} has the figures of no plot; run consistency-lens eval or report with it")
    return drawn


def write_page(path: Path, figure: AnyFigure) -> Path:
    """Writes a plotly figure as a page; the library that it needs lies beside it, once for all pages of a folder."""
    from plotly.offline import get_plotlyjs

    if not (path.parent / SCRIPT).is_file():
        write_text(path.parent / SCRIPT, get_plotlyjs())
    write_text(path, figure.to_html(include_plotlyjs="directory"))
    return path
