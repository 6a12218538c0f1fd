"""`consistency-lens train`, and the whole of `examples/train_lens.py`: train and evaluate a lens from a recipe."""

import logging
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a recipe; prints the held-out figures, sample rows and where the lens lies. Returns the exit code."""
    import transformers
    from rich.console import Console

    from ..evaluation.report import metrics_table, samples_table
    from ..training.arguments import ConsistencyLensTrainingArguments
    from ..training.callbacks import NonfiniteGradientsError
    from ..training.recipe import RecipeArguments, run
    from .parser import parse_arguments

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    transformers.utils.logging.set_verbosity_warning()
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        recipe, training = parse_arguments((RecipeArguments, ConsistencyLensTrainingArguments), argv)
        result = run(recipe, training)
    except (ValueError, NonfiniteGradientsError) as error:
        mistake = isinstance(error, ValueError)
        message = f"{'error' if mistake else 'failed'}: {error}"
        Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
        return 2 if mistake else 1
    if training.process_index == 0:
        console.print(samples_table(result.samples))
        console.print(metrics_table(result.metrics))
        console.print(f"The lens lies in {result.output_dir} (figures: metrics.json, all samples: samples.jsonl)")
    return 0
