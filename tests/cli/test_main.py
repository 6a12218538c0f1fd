"""What all commands do alike."""

import subprocess
import sys

import pytest
from cache_runs import ENVIRONMENT

from consistency_lens.cli import tuned_lens
from consistency_lens.cli.command import FIRST_SPEAKS, MISTAKE, run_command
from consistency_lens.cli.main import COMMANDS, main

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


TUNED_LENS = "tuned-lens"
LINES = [[name] for name in COMMANDS if name != TUNED_LENS] + [[TUNED_LENS, name] for name in tuned_lens.COMMANDS]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_every_command_explains_its_arguments(line, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*line, "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and "--config" in shown
    assert "MISSING" not in shown and "%%" not in shown


@pytest.mark.parametrize("line", [[], [TUNED_LENS]], ids=["all", TUNED_LENS])
def test_commands_are_listed_where_none_is_named(line, capsys):
    assert main(line) == 0
    assert "usage: consistency-lens" in capsys.readouterr().out
    assert main([*line, "fitt"]) == MISTAKE
    assert "unknown command 'fitt'" in capsys.readouterr().err


def test_libraries_that_are_imported_on_the_way_say_nothing():
    # in a process of its own: here they are imported long since
    command = [sys.executable, "-m", "consistency_lens", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_once():
    train = [*LAUNCH, "-m", "consistency_lens", "train", "--model", "gpt2", "--ema_decay", "2", "--use_cpu"]
    done = subprocess.run(train, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stderr.count("error: ema_decay") == 1


def test_a_mistake_of_a_later_process_alone_is_told_too(monkeypatch, capsys):
    def work(console):
        raise ValueError("shard: got none")

    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(work) == MISTAKE
        assert capsys.readouterr().err == "error: shard: got none\n"
    assert waited == [FIRST_SPEAKS]
