"""KPIs and gates for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


def gates_shown(kpis: Mapping[str, Any], acceptance: Mapping[str, bool]) -> "Group":
    """A table of the KPIs with their intervals, and one of the gates, in which what did not pass stands out."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ...evaluation.report import rich_table
    from ...tuned_lens.tables import GATE_COLUMNS, KPI_COLUMNS, caption, gate_rows, kpi_rows

    gates = Table()
    for column in GATE_COLUMNS:
        gates.add_column(column)
    for letter, asks, verdict in gate_rows(acceptance):
        gates.add_row(letter, asks, Text(verdict, style="green" if verdict == "passed" else "bold red"))
    return Group(rich_table(KPI_COLUMNS, kpi_rows(kpis)), caption(kpis), gates)
