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

        (args,) = parse_arguments((ReportArguments,), named_run(argv))
        path, document = build_report(args)
        for note in document["notes"]:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        console.print(f"Report: {path}", markup=False, highlight=False, soft_wrap=True)

    return run_command(work)


def named_run(argv: Sequence[str] | None) -> list[str]:
    """The flags, where the run may be said first without its flag."""
    import sys

    given = list(sys.argv[1:] if argv is None else argv)
    return ["--run", *given] if given and not given[0].startswith("-") else given
