"""`consistency-lens tuned-lens`: one small module for each sub-command, imported when it is called."""

from collections.abc import Sequence

from ..dispatch import dispatch

COMMANDS = {
    "fit": "fit the translators of a model (--model gpt2)",
    "eval": "KL of every layer on held-out text (--lens tuned_lenses/gpt2)",
    "sweep": "records of both lenses on prompts, as CSV and JSON (--model gpt2 --tuned auto)",
    "gates": "judge a lens by gates A to D on a prompt suite (--lens tuned_lenses/gpt2)",
    "plot": "figures and a page of a sweep (--records runs/gpt2)",
    "publish": "publish a lens in a data set of lenses on the Hub (--lens tuned_lenses/gpt2 --repo me/tuned-lenses)",
    "list": "the lenses of such a data set (--repo me/tuned-lenses)",
    "download": "fetch lenses of such a data set (--repo me/tuned-lenses --model gpt2 --revision v2026.01.31)",
    "verify": "a lens against its checksums, its provenance and its model (--lens tuned_lenses/gpt2)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns its exit code."""
    return dispatch("consistency-lens tuned-lens", COMMANDS, __package__, argv)
