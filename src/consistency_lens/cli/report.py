"""`consistency-lens report RUN`: one HTML page of what a run left and of what its lens says about some texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and says where it lies. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..report.building import ReportArguments, build_report

        (args,) = parse_arguments((ReportArguments,), argv, "report", first="run")
        path, document = build_report(args)
        for line in (*document["notes"], f"Report: {path}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work)
