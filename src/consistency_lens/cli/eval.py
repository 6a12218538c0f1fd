"""`consistency-lens eval`, and the whole of `examples/evaluate_lens.py`: evaluate a saved lens on held-out rows."""

import logging
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates a lens; prints sample rows, figures and where they lie. Returns the exit code."""
    import transformers
    from rich.console import Console

    from ..evaluation.report import metrics_table, samples_table
    from ..evaluation.saved_lens import SavedLensArguments, WholeEvaluationArguments, evaluate_saved_lens
    from .parser import parse_arguments

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_warning()
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        lens, evaluation = parse_arguments((SavedLensArguments, WholeEvaluationArguments), argv)
        metrics, samples, folder = evaluate_saved_lens(lens, evaluation)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    console.print(samples_table(samples))
    console.print(metrics_table(metrics))
    console.print(f"Figures and arguments: {folder / 'metrics.json'}; all samples: {folder / 'samples.jsonl'}")
    return 0
