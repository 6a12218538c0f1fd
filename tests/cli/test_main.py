"""What all commands do alike."""

import subprocess
import sys

import pytest

from consistency_lens.cli.main import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and "--config" in shown
    assert "MISSING" not in shown and "%%" not in shown


def test_libraries_that_are_imported_on_the_way_say_nothing():
    # in a process of its own: here they are imported long since
    command = [sys.executable, "-m", "consistency_lens", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
