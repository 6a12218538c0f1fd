"""`consistency-lens list`: the lenses of a repository on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .artifact_kinds import CACHE, LENS, TUNED_LENS, kind_of_repository

if TYPE_CHECKING:
    from rich.console import Console

    from ..hub.index import IndexedRepository

COLUMNS = ("name", "kind", "base model", "layer", "T", "FVE", "KL recovered", "release", "bytes")
NONE = "–"


@dataclass
class ListArguments:
    """Which repository, and at which revision."""

    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name; datasets/user/name for a data set."})
    revision: str | None = field(
        default=None,
        metadata={"help": "Tag of a release, commit or branch; default: main, or the newest finished release."},
    )
    json: bool = field(
        default=False,
        metadata={
            "help": "As JSON: all that the index says, commit and releases; `unfinished`, a release that has no tag; "
            "`later`, the commit that main has gone on to since."
        },
    )

    def __post_init__(self) -> None:
        if not self.repo:
            raise ValueError("repo: got none; pass it, e.g. --repo user/lenses")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of lenses and the releases. Returns the exit code, 3 for an index that was damaged on its way."""
    from ..data.cache_check import VerificationError
    from .command import NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((ListArguments,), argv, "list")
        show(args, console)

    return run_command(work, {VerificationError: NOT_VERIFIED})


def show(args: ListArguments, console: "Console") -> None:
    """The work of the command.

    Raises:
        ValueError: if there is no such repository, or it holds no lenses.
        VerificationError: if its index was damaged on its way.
        HubError: if the Hub cannot be reached, or fails.
    """
    import json

    from rich.table import Table
    from rich.text import Text

    found, rows = _found(args)
    if args.json:
        lenses = {name: asdict(entry) for name, entry in found.entries.items()}
        state = {"commit": found.commit, "releases": found.tags, "unfinished": found.unfinished, "later": found.later}
        content = {"repo": found.repo, **state, "lenses": lenses}
        console.print(json.dumps(content, indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[3:7] + COLUMNS[8:] else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as Text, since a name may look like rich's markup
    console.print(table)
    print_state(found, console)


def print_state(found: "IndexedRepository[Any]", console: "Console") -> None:
    """A line of what is listed and of all releases, and one of what main holds if that is something else."""
    lines = [f"commit {found.commit}; releases: {', '.join(found.tags) or 'none'}"]
    if found.unfinished is not None:
        lines.append(f"The release {found.unfinished} is not finished, it has no tag; push it once more.")
    elif found.later is not None:
        lines.append(f"Main has gone on since, to commit {found.later}, which is no release and is not listed.")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _found(args: ListArguments) -> "tuple[IndexedRepository[Any], list[tuple[str, ...]]]":
    """What the repository holds, and a row for each lens."""
    repo, kind = kind_of_repository(args.repo)
    if kind == LENS:
        from ..hub.lens_collection import KIND_NAMES, figure, list_lenses

        lenses = list_lenses(repo, args.revision)
        rows: list[tuple[str, ...]] = []
        for name, of in lenses.entries.items():
            base = _pinned(of.base_model.name, of.base_model.revision)
            figures = (figure(of, "fve"), figure(of, "kl_recovered"))
            sizes = (str(of.layer), str(of.num_text_tokens))
            rows.append((name, KIND_NAMES[of.kind], base, *sizes, *figures, of.release, f"{of.size:,}"))
        return lenses, rows
    if kind == TUNED_LENS:
        from ..tuned_lens.download import list_tuned_lenses

        tuned = list_tuned_lenses(repo, args.revision)
        return tuned, [
            (name, kind, _pinned(name, of.model_commit), "all", NONE, NONE, NONE, of.release, NONE)
            for name, of in tuned.entries.items()
        ]
    raise ValueError(f"repo: {repo!r} holds no lenses ({CACHE} or something else); pass a repository of lenses")


def _pinned(name: str, revision: str | None) -> str:
    return f"{name}@{revision[:12]}" if revision is not None else f"{name} (local)"
