"""The first word of a command line: which module it names."""

import importlib
import sys
from collections.abc import Mapping, Sequence


def dispatch(program: str, commands: Mapping[str, str], package: str | None, argv: Sequence[str] | None) -> int:
    """Imports the module of a sub-command and runs it; the commands are listed where none is named.

    Args:
        program: what is typed before the sub-command.
        commands: name -> what it does; each is a module of `package`, hyphens as underscores.
        argv: the sub-command and its flags; None takes them from the command line.

    Returns:
        0 done, 1 failed while running, 2 the user's mistake, 3 a verification or gate did not pass.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND [--config FILE] [flags]\n\ncommands:")
        for name, text in commands.items():
            print(f"  {name:<14} {text}")
        return 0
    if argv[0] not in commands:
        print(f"error: unknown command {argv[0]!r}; one of: {', '.join(commands)}", file=sys.stderr)
        return 2
    return importlib.import_module(f".{argv[0].replace('-', '_')}", package).main(argv[1:])
