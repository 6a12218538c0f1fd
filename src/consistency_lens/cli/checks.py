"""Checks of an artifact for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..data.cache_check import Check


def show_checks(path: Path, checks: "Sequence[Check]", console: "Console") -> None:
    """Prints a folder and what was found in it."""
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    console.print(checks_table(checks))


def checks_table(checks: "Sequence[Check]") -> "Table":
    """One row a check; what failed stands out."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("check", "", "found"):
        table.add_column(name)
    for check in checks:
        if check.passed:
            verdict = Text("passed", style="green")
        else:
            verdict = Text("FAILED", style="bold red") if check.checked else Text("not checked", style="yellow")
        # as Text, since a name may look like rich's markup
        table.add_row(Text(check.name), verdict, Text(check.detail))
    return table
