"""`consistency-lens plot RUN`: plots of a run's figures, one file each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Draws a run; prints what could not be drawn, and where the plots lie. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..plots.files import PlotArguments, draw_run

        (args,) = parse_arguments((PlotArguments,), argv, "plot", first="run")
        files, notes = draw_run(args)
        for line in (*notes, *map(str, files)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work)
