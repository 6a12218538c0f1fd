"""`consistency-lens tuned-lens list`: the tuned lenses of a data set on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ...tuned_lens.download import TunedLensRepository


@dataclass
class ListArguments:
    """Which repository, and at which revision."""

    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name."})
    revision: str | None = field(
        default=None,
        metadata={"help": "Tag of a release, commit or branch; default: main, or the newest finished release."},
    )

    def __post_init__(self) -> None:
        if not self.repo:
            raise ValueError("repo: got none; pass it, e.g. --repo user/tuned-lenses")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of lenses and the releases. Returns the exit code."""
    from ..command import run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> None:
        from ...tuned_lens.download import list_tuned_lenses
        from ..list import print_state

        (args,) = parse_arguments((ListArguments,), argv, "tuned-lens list")
        found = list_tuned_lenses(args.repo, args.revision)
        console.print(lenses_table(found))
        print_state(found, console)

    return run_command(work)


def lenses_table(found: "TunedLensRepository") -> "Table":
    """One row a model."""
    from rich.table import Table
    from rich.text import Text

    from ...tuned_lens.index import GATES

    table = Table()
    for name in ("model", "release", "model commit", *(f"gate {gate[-1]}" for gate in GATES), "licence"):
        table.add_column(name)
    verdicts = {True: ("passed", "green"), False: ("not passed", "yellow")}
    for model, entry in found.entries.items():
        gates = [Text(*verdicts[entry.acceptance[gate]]) for gate in GATES]
        commit = entry.model_commit[:12] if entry.model_commit else "local model"
        # as Text, since a name may look like rich's markup
        table.add_row(Text(model), Text(entry.tl_version), Text(commit), *gates, Text(entry.license or "none stated"))
    return table
