"""The command `consistency-lens`: one small module for each sub-command, imported when it is called."""

import sys
from collections.abc import Sequence

from .commands import COMMANDS, PROGRAM
from .dispatch import dispatch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns its exit code."""
    return dispatch(PROGRAM, COMMANDS, __package__, argv)


if __name__ == "__main__":
    sys.exit(main())
