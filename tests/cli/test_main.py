"""What all commands do alike."""

import io
import re
import subprocess
import sys

import pytest
from cache_runs import ENVIRONMENT

from consistency_lens import __version__
from consistency_lens.cli.command import FAILED, FIRST_SPEAKS, MISTAKE, run_command
from consistency_lens.cli.commands import COMMANDS, TUNED_LENS, TUNED_LENS_COMMANDS, all_commands
from consistency_lens.cli.completion import LISTED_FLAG
from consistency_lens.cli.dispatch import DEBUG_VARIABLE, dispatch
from consistency_lens.cli.main import main

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def undisturbed(monkeypatch):
    """What `--debug` sets is taken back."""
    monkeypatch.setenv(DEBUG_VARIABLE, "")


@pytest.mark.parametrize("command", all_commands())
def test_every_command_says_what_it_does_and_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    listed = capsys.readouterr().out
    shown, about = " ".join(listed.split()), all_commands()[command]
    assert exit.value.code == 0 and "--config" in shown
    assert "MISSING" not in shown and "%%" not in shown
    assert shown.startswith(f"usage: consistency-lens {command} ") and about.summary[1:] in shown
    assert shown.endswith(f"Example: consistency-lens {command} {about.example}".rstrip())
    assert set(re.findall(r"--\w+", about.example)) <= {"--config", *LISTED_FLAG.findall(listed)}


@pytest.mark.parametrize(("line", "commands"), [([], COMMANDS), ([TUNED_LENS], TUNED_LENS_COMMANDS)], ids=len)
def test_commands_are_listed_in_their_groups(line, commands, capsys):
    assert main(line) == 0
    shown = capsys.readouterr().out
    for name, command in commands.items():
        assert f"\n{command.group}:\n" in shown and f"  {name} " in shown and command.summary in shown
    assert main(["--help"]) == 0 and "Exit codes: 0 done" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"consistency-lens {__version__}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["trian"], "error: unknown command 'trian'; did you mean 'train'?\n"),
        ([TUNED_LENS, "fitt"], "error: unknown command 'fitt'; did you mean 'fit'?\n"),
        (["zzz"], f"error: unknown command 'zzz'; one of: {', '.join(COMMANDS)}\n"),
    ],
)
def test_an_unknown_command_is_told_with_the_nearest(line, said, capsys):
    assert main(line) == MISTAKE
    assert capsys.readouterr().err == said


def test_a_mistake_is_one_line_and_with_debug_a_traceback(undisturbed, capsys):
    assert main(["describe"]) == MISTAKE
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["describe", "--debug"]) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.splitlines()[-1].startswith("error: cache: got none")


def test_debug_with_a_value_is_left_to_the_trainer(undisturbed, monkeypatch):
    seen = []
    module = type(sys)("seeing")
    module.main = lambda argv: seen.append(argv) or 0
    monkeypatch.setitem(sys.modules, "seeing.train", module)
    dispatch("program", COMMANDS, "seeing", ["train", "--debug", "underflow_overflow", "--debug", "--seed", "1"])
    assert seen == [["--debug", "underflow_overflow", "--seed", "1"]]


def test_an_unexpected_error_is_told_in_a_line_on_a_terminal_and_whole_in_a_log(undisturbed, monkeypatch, capsys):
    def work(console):
        raise RuntimeError("the kernel\nfailed")

    with pytest.raises(RuntimeError):
        run_command(work)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_command(work) == FAILED
    assert capsys.readouterr().err == (
        "failed: RuntimeError: the kernel failed (an unexpected error; --debug shows where)\n"
    )


def test_ctrl_c_is_told_in_a_line_on_a_terminal(undisturbed, monkeypatch, capsys):
    def work(console):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command(work)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_command(work) == 130
    assert capsys.readouterr().err == "interrupted (--debug shows where)\n"


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


def test_a_rank_that_is_no_number_hides_no_mistake(monkeypatch, capsys):
    def work(console):
        raise ValueError("shard: got none")

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "first")
    assert run_command(work) == MISTAKE
    assert capsys.readouterr().err == "error: shard: got none\n"


def test_what_the_terminal_cannot_show_is_shown_escaped(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert run_command(lambda console: console.print("caf\u00e9 \u00b7")) == 0
    assert shown.getvalue() == b"caf\\xe9 \\xb7\n"


def test_closed_streams_are_no_fault(monkeypatch):
    def work(console):
        console.print("figures")
        raise ValueError("shard: got none")

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(work) == MISTAKE


CLOSED_PIPE = """
import os, sys
from consistency_lens.cli.{module} import {name} as tried
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
sys.exit(tried({argument}))
"""


@pytest.mark.parametrize(
    ("module", "name", "argument", "code"),
    [("main", "main", "['--help']", 0), ("command", "run_command", "lambda _: print('x' * 10 ** 6)", FAILED)],
    ids=["help", "command"],
)
def test_a_reader_that_goes_away_is_no_fault(module, name, argument, code):
    script = CLOSED_PIPE.format(module=module, name=name, argument=argument)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
