"""`consistency-lens tuned-lens fit`, and the whole of `examples/fit_tuned_lens.py`: fit a tuned lens."""

from collections.abc import Sequence
from functools import partial
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

        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        fit, training = parse_arguments((FitArguments, TunedLensTrainingArguments), argv, "tuned-lens fit")
        result = fit_tuned_lens(fit, training)
        if training.process_index > 0:
            return
        if result.was_there:
            others = f" (of {'; '.join(result.others)})" if result.others else ""
            say(f"{result.output_dir} has a fitted lens{others}, which is kept; pass --force to fit it anew")
        if result.metrics:
            console.print(kl_table(result.metrics))
        say(f"The lens lies in {result.output_dir} (figures: metrics.json, how it was made: provenance.json)")

    return run_command(work)
