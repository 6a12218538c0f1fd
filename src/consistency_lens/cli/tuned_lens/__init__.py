"""`consistency-lens tuned-lens`: one small module for each sub-command, imported when it is called."""

from collections.abc import Sequence

from ..commands import PROGRAM, TUNED_LENS, TUNED_LENS_COMMANDS
from ..dispatch import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns its exit code."""
    return dispatch(f"{PROGRAM} {TUNED_LENS}", TUNED_LENS_COMMANDS, __package__, argv)
