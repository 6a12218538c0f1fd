"""`consistency-lens tuned-lens fit`, and the whole of `examples/fit_tuned_lens.py`: fit a tuned lens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Fits a lens; prints its held-out figures and where it lies. Returns the exit code."""
    from ..command import run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> None:
        from ...tuned_lens.fit import fit_tuned_lens
        from ...tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments
        from .tables import kl_table

        fit, training = parse_arguments((FitArguments, TunedLensTrainingArguments), argv)
        result = fit_tuned_lens(fit, training)
        if training.process_index > 0:
            return
        if result.was_there:
            console.print(f"{result.output_dir} has a fitted lens, which is kept; pass --force to fit it anew")
        console.print(kl_table(result.metrics))
        console.print(
            f"The lens lies in {result.output_dir} (figures: metrics.json, how it was made: provenance.json)"
        )

    return run_command(work)
