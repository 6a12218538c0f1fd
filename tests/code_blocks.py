"""The fenced code of a page or a card, and how a test runs it: as it is written, in this process."""

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser

from consistency_lens.cli.main import main

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
ANY_FENCE = re.compile(r"^[\s>]*(?:```|~~~)", flags=re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    """Of the page, where its code begins."""


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in their order.

    Raises:
        AssertionError: if there are others than those: indented, with more than a language, without an end.
    """
    blocks = [Block(found[1], found[2], text.count("\n", 0, found.start()) + 2) for found in FENCE.finditer(text)]
    assert len(ANY_FENCE.findall(text)) == 2 * len(blocks), "nothing reads a fence that does not look like the others"
    return blocks


def run_python(code: str, place: str) -> dict[str, Any]:
    """Runs Python in a module of its own; returns the names that it leaves."""
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(code, place, "exec"), names)
    return names


def commands_of(code: str) -> list[str]:
    """The commands of a shell block, continued lines joined, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def run_command(command: str) -> None:
    """Runs a command that starts this package or a Python script.

    `accelerate launch` reads its flags, but starts no process: the tests of the launched processes are others.

    Raises:
        AssertionError: if it is another command, or its exit code is not 0.
    """
    program, *words = shlex.split(command)
    if [program, *words[:1]] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[1:])
        assert launched.config_file is None or Path(launched.config_file).is_file(), command
        run_script(launched.training_script, launched.training_script_args, runs_module=bool(launched.module))
    elif program == "python":
        run_script(words[0], words[1:])
    else:
        assert program == "consistency-lens", f"nothing runs {command!r}"
        assert main(words) == 0, command


def run_script(name: str, arguments: list[str], runs_module: bool = False) -> None:
    """Runs a script, or a module as `python -m` does."""
    run: Callable[..., Any] = runpy.run_module if runs_module else runpy.run_path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            run(name, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, *arguments)


def replaced(code: str, by: Mapping[str, str]) -> str:
    """The code with placeholders filled."""
    for placeholder, filling in by.items():
        code = code.replace(placeholder, filling)
    return code


def run_card(card: str) -> list[dict[str, Any]]:
    """Runs every block of a card but its citation; returns the names that each block of Python leaves."""
    left = []
    for block in blocks_of(card):
        if block.language == "python":
            left.append(run_python(block.code, f"card, line {block.line}"))
        elif block.language == "bash":
            for command in commands_of(block.code):
                run_command(command)
        else:
            assert block.language == "bibtex", f"nothing runs {block.language!r}"
    assert left
    return left
