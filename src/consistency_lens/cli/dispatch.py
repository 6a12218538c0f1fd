"""The first word of a command line: which module it names."""

import difflib
import importlib
import os
import select
import sys
from collections.abc import Mapping, Sequence

from .commands import Command

DEBUG_FLAG, DEBUG_VARIABLE = "--debug", "CONSISTENCY_LENS_DEBUG"


def dispatch(program: str, commands: Mapping[str, Command], package: str | None, argv: Sequence[str] | None) -> int:
    """Imports the module of a sub-command and runs it; the commands are listed where none is named.

    Args:
        program: what is typed before the sub-command.
        commands: by name; each is a module of `package`, hyphens as underscores.
        argv: the sub-command and its flags; None takes them from the command line. A bare `--debug` among them has
            errors shown with their tracebacks, here and in the processes that are started.

    Returns:
        0 done, 1 failed while running, 2 the user's mistake, 3 a verification or gate did not pass.
    """
    argv = without_debug_flag(list(sys.argv[1:] if argv is None else argv))
    if not argv or argv[0] in ("-h", "--help"):
        try:
            print(overview(program, commands), flush=True)
        except BrokenPipeError:
            if not reader_is_gone():
                raise
        return 0
    if argv[0] == "--version":
        from .. import __version__

        print(f"{program} {__version__}")
        return 0
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(commands)}"
        print(f"error: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(f".{argv[0].replace('-', '_')}", package).main(argv[1:])


def overview(program: str, commands: Mapping[str, Command]) -> str:
    """The commands under the headings of their groups."""
    width = max(map(len, commands)) + 2
    lines = [f"usage: {program} COMMAND [--config FILE] [flags]"]
    for group in dict.fromkeys(command.group for command in commands.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<{width}}{of.summary}" for name, of in commands.items() if of.group == group]
    first = next(iter(commands))
    lines += [
        "",
        f"example: {program} {first} {commands[first].example}",
        f"`{program} COMMAND --help` lists the flags and has an example; {DEBUG_FLAG} shows tracebacks.",
        "Exit codes: 0 done, 1 failed while running, 2 a mistake in the arguments, 3 a gate or check did not pass.",
    ]
    return "\n".join(lines)


def without_debug_flag(argv: list[str]) -> list[str]:
    """The line without a bare `--debug`, which is kept in the environment; one with a value is the trainer's own."""
    rest = []
    for part, following in zip(argv, [*argv, "-"][1:], strict=True):
        if part == DEBUG_FLAG and following.startswith("-"):
            os.environ[DEBUG_VARIABLE] = "1"
        else:
            rest.append(part)
    return rest


def reader_is_gone() -> bool:
    """Whether it is the output that nobody reads any more, as behind `head`; then nothing more is written to it."""
    try:
        output = sys.stdout.fileno()
        watched = select.poll()
        watched.register(output, 0)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0)):
            return False
    except (AttributeError, OSError):  # no pipe, or a system without `poll`
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # what is left to write goes there at the end
    return True
