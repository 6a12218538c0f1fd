"""`consistency-lens explain TEXT`: what a lens says about each token of a text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..explanation import Explanation


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of explanations, or JSON. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..evaluation.explained_text import ExplainArguments, explain_with

        (args,) = parse_arguments((ExplainArguments,), argv, "explain", first="text")
        explanation = explain_with(args)
        if args.json:
            print_json(explanation)
        else:
            console.print(explanation.table(), markup=False)

    return run_command(work)


def print_json(explanation: "Explanation") -> None:
    """Plain JSON, for another program to read: nothing is wrapped or coloured."""
    import json

    print(json.dumps(explanation.to_dict(), indent=2))
