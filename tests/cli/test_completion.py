"""The script that completes commands and flags: complete, and one that a shell reads."""

import shutil
import subprocess

import pytest

from consistency_lens.cli.commands import all_commands
from consistency_lens.cli.completion import complete_parser
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


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_reads_the_script_and_completes(monkeypatch, capsys):
    monkeypatch.setattr("consistency_lens.cli.completion.COMMANDS", {"doctor": all_commands()["doctor"]})
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    tail = "COMP_WORDS=(consistency-lens doctor --js); COMP_CWORD=2; _shtab_consistency_lens; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", f"{script}\n{tail}"], capture_output=True, text=True)
    assert done.stdout.strip() == "--json", done.stderr


def test_another_shell_is_a_mistake(capsys):
    assert main(["completion", "fish"]) == 2
    assert "--shell: invalid choice: 'fish'" in capsys.readouterr().err
