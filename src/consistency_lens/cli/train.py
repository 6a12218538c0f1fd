"""`consistency-lens train`, and the whole of `examples/train_lens.py`: train and evaluate a lens from a recipe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a recipe; prints the held-out figures, sample rows and where the lens lies. Returns the exit code.

    A run that SIGTERM or SIGUSR1 interrupts is done too: it prints how to go on. With `--dry_run` it prints what the
    run would be, and does nothing.
    """
    from ..training.nonfinite import NonfiniteGradientsError
    from .command import DONE, FAILED, run_command
    from .parser import RECIPE_SECTIONS, parse_arguments

    def work(console: "Console") -> int | None:
        from ..evaluation.report import metrics_table, samples_table
        from ..training.arguments import ConsistencyLensTrainingArguments
        from ..training.interruption import RunInterrupted
        from ..training.recipe import run
        from ..training.recipe_arguments import RecipeArguments

        recipe, training = parse_arguments(
            (RecipeArguments, ConsistencyLensTrainingArguments), argv, "train", RECIPE_SECTIONS
        )
        if recipe.dry_run:
            from ..training.dry_run import dry_run
            from .dry_run_tables import dry_run_tables

            plan = dry_run(recipe, training)
            if training.process_index == 0:
                console.print(dry_run_tables(plan))
            return DONE
        try:
            result = run(recipe, training)
        except RunInterrupted as interrupted:
            if training.process_index == 0:
                console.print(str(interrupted), markup=False, highlight=False, soft_wrap=True)
            return DONE
        if training.process_index == 0:
            console.print(samples_table(result.samples))
            console.print(metrics_table(result.metrics))
            console.print(f"The lens lies in {result.output_dir} (figures: metrics.json, all samples: samples.jsonl)")
        return DONE

    return run_command(work, {NonfiniteGradientsError: FAILED})
