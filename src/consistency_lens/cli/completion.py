"""`consistency-lens completion`: a script that completes commands and flags in a shell."""

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from .commands import COMMANDS, PROGRAM, TUNED_LENS, TUNED_LENS_COMMANDS

if TYPE_CHECKING:
    from rich.console import Console

Shell = Literal["bash", "zsh", "fish", "tcsh"]
# how shtab completes a value, for each shell
A_FILE = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "fish": "(__fish_complete_path (commandline -ct))",
    "tcsh": "f",
}
# what a command's --help lists: a flag at the beginning of a line
LISTED_FLAG = re.compile(r"^  (?:-\w, )?(--[a-z0-9_]+)", re.MULTILINE)


@dataclass
class CompletionArguments:
    """The shell whose script is printed."""

    shell: Shell = field(default="bash", metadata={"help": "bash, zsh, fish or tcsh."})

    def __post_init__(self) -> None:
        if self.shell not in get_args(Shell):
            raise ValueError(f"shell: must be one of {', '.join(get_args(Shell))}, got {self.shell!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the script: `eval "$(consistency-lens completion)"` in bash, `consistency-lens completion fish | source`.

    Returns the exit code.
    """
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..optional_packages import require

        (args,) = parse_arguments((CompletionArguments,), argv, "completion", first="shell")
        shtab = require("shtab", "cli", "completion")
        print(shtab.complete(complete_parser(), shell=args.shell))

    return run_command(work)


def complete_parser() -> argparse.ArgumentParser:
    """A parser of every command with its flags, as their own helps list them; it completes and parses nothing."""
    package, parser = __package__ or "", argparse.ArgumentParser(PROGRAM)
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        if name != TUNED_LENS:
            add_flags(commands.add_parser(name, help=command.summary), package, name)
            continue
        tuned = commands.add_parser(name, help=command.summary).add_subparsers()
        for below, of in TUNED_LENS_COMMANDS.items():
            add_flags(tuned.add_parser(below, help=of.summary), f"{package}.tuned_lens", below)
    return parser


def add_flags(parser: argparse.ArgumentParser, package: str, name: str) -> None:
    """Gives a parser the flags that the help of a command lists; any of them may take a file."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        importlib.import_module(f".{name.replace('-', '_')}", package).main(["--help"])
    for flag in dict.fromkeys(LISTED_FLAG.findall(shown.getvalue())):
        if flag != "--help":
            argument: Any = parser.add_argument(flag)
            argument.complete = A_FILE
