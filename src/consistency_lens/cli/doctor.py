"""`consistency-lens doctor`: what is installed, which devices there are, and what is missing for which feature."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .diagnosis import Finding


@dataclass
class DoctorArguments:
    """How the findings are printed."""

    json: bool = field(default=False, metadata={"help": "JSON in place of tables."})


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was found. Returns 3 if something is missing that every feature needs."""
    from .command import DONE, NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> int:
        from .diagnosis import diagnose

        (args,) = parse_arguments((DoctorArguments,), argv, "doctor")
        sections = diagnose()
        if args.json:
            import json

            print(json.dumps({name: [asdict(of) for of in found] for name, found in sections.items()}, indent=2))
        else:
            for name, found in sections.items():
                console.print(findings_table(name, found))
        broken = any(of.state == "missing" for found in sections.values() for of in found)
        return NOT_VERIFIED if broken else DONE

    return run_command(work)


def findings_table(title: str, findings: "Sequence[Finding]") -> "Table":
    """One row a finding; what is missing stands out."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "found", "", title=title, title_justify="left", show_header=False)
    styles = {"good": "green", "absent": "yellow", "missing": "bold red", "info": ""}
    for of in findings:
        table.add_row(Text(of.name), Text(of.found, style=styles[of.state]), Text(of.advice))
    return table
