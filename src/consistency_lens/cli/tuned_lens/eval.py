"""`consistency-lens tuned-lens eval`: KL of every layer on held-out text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates a saved lens; prints its figures and where they lie. Returns the exit code."""
    from ..command import run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> None:
        from dataclasses import asdict

        from ...atomic_write import write_json
        from ...tuned_lens.evaluation import EvaluationArguments, evaluate_tuned_lens
        from .tables import kl_table

        (args,) = parse_arguments((EvaluationArguments,), argv, "tuned-lens eval")
        metrics = evaluate_tuned_lens(args)
        write_json(args.folder / "metrics.json", metrics)
        write_json(args.folder / "arguments.json", asdict(args))
        console.print(kl_table(metrics))
        console.print(f"Figures and arguments: {args.folder / 'metrics.json'}", markup=False, soft_wrap=True)

    return run_command(work)
