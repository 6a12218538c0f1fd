"""`consistency-lens eval`, and the whole of `examples/evaluate_lens.py`: evaluate a saved lens on held-out rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates a lens; prints sample rows, figures and where they lie. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..evaluation.report import metrics_table, samples_table
        from ..evaluation.saved_lens import SavedLensArguments, WholeEvaluationArguments, evaluate_saved_lens

        lens, evaluation = parse_arguments((SavedLensArguments, WholeEvaluationArguments), argv, "eval")
        metrics, samples, folder = evaluate_saved_lens(lens, evaluation)
        console.print(samples_table(samples))
        console.print(metrics_table(metrics))
        console.print(f"Figures and arguments: {folder / 'metrics.json'}; all samples: {folder / 'samples.jsonl'}")

    return run_command(work)
