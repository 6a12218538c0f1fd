"""The script that completes commands and flags: complete, and one that a shell reads."""

import shutil
import subprocess
from typing import get_args

import pytest

from consistency_lens.cli.commands import all_commands
from consistency_lens.cli.completion import Shell, complete_parser
from consistency_lens.cli.main import main


@pytest.fixture(scope="module")
def choices():
    """command -> parser, those of tuned lenses under their own."""
    return complete_parser()._subparsers._group_actions[0].choices


def test_every_command_and_flag_is_in_it(choices):
    flags = {name: set(parser._option_string_actions) for name, parser in choices.items()}
    assert {"--lens", "--text", "--positions", "--json", "--config"} <= flags["explain"]
    assert "--stages" in flags["train"] and "--output_dir" in flags["train"]
    tuned = choices["tuned-lens"]._subparsers._group_actions[0].choices
    names = set(flags) | {f"tuned-lens {name}" for name in tuned}
    assert names - {"tuned-lens"} == set(all_commands())


@pytest.fixture
def doctor_alone(monkeypatch):
    """One command is enough for a script, and quicker."""
    monkeypatch.setattr("consistency_lens.cli.completion.COMMANDS", {"doctor": all_commands()["doctor"]})


@pytest.mark.parametrize("shell", get_args(Shell))
def test_there_is_a_script_for_each_shell(shell, doctor_alone, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "doctor" in script and "json" in script


def completed(shell, script, line):
    """What a shell that has read the script makes of a line."""
    tails = {
        "bash": f"COMP_WORDS=({line}); COMP_CWORD=2; _shtab_consistency_lens; echo ${{COMPREPLY[@]}}",
        "fish": f"complete -C '{line}'",
    }
    done = subprocess.run([shell, "-c", f"{script}\n{tails[shell]}"], capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_reads_the_script_and_completes(shell, doctor_alone, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert main(["completion", shell]) == 0
    assert completed(shell, capsys.readouterr().out, "consistency-lens doctor --js")[0] == "--json"


def test_another_shell_is_a_mistake(capsys):
    assert main(["completion", "elvish"]) == 2
    assert "--shell: invalid choice: 'elvish'" in capsys.readouterr().err
