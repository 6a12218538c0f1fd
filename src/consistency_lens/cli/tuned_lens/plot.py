"""`consistency-lens tuned-lens plot`: figures of a sweep, and a page to walk through one prompt."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["png", "svg", "pdf"]


@dataclass
class PlotArguments:
    """Which sweep is drawn, and how."""

    records: str = field(
        default="",
        metadata={"help": "Folder of a sweep, or its prefix where a folder has several: runs/x for x-records.csv."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder that the figures are written to; default: plots/ beside the records."}
    )
    format: Format = field(default="png", metadata={"help": "Format of the figures."})
    prompt: str | None = field(default=None, metadata={"help": "Id of the heatmap's prompt; default: the first one."})

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("records: got none; pass what tuned-lens sweep wrote, e.g. --records runs/gpt2")
        if self.format not in get_args(Format):
            raise ValueError(f"format: must be one of {', '.join(get_args(Format))}, got {self.format!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Draws a sweep; prints where the figures lie. Returns the exit code."""
    from ..command import run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> None:
        from ...atomic_write import write_json
        from ...tuned_lens.sweep_figures import draw_sweep, find_sweep

        (args,) = parse_arguments((PlotArguments,), argv, "tuned-lens plot")
        sweep = find_sweep(Path(args.records))
        folder = sweep.norm.parent / "plots" if args.output_dir is None else Path(args.output_dir)
        files, notes = draw_sweep(sweep, folder, args.format, args.prompt)
        write_json(folder / f"{sweep.name}-plot-arguments.json", asdict(args))
        for line in (*notes, *map(str, files)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work)
