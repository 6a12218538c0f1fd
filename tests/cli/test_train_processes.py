"""The train command in processes of its own, one or two: SIGKILL at random moments, SIGTERM and SIGUSR1."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from cache_runs import ENVIRONMENT, ROOT
from train_runs import flags, outcome, write_inputs

ONE = [sys.executable, str(ROOT / "examples" / "train_lens.py")]
TWO = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    str(ROOT / "examples" / "train_lens.py"),
]  # fmt: skip
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="several processes on the CPU")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def assert_same(folder, expected):
    curves, tensors, tables = outcome(folder)
    assert (curves, tables) == (expected[0], expected[2]), folder
    assert tensors.keys() == expected[1].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[1][name]), (folder, name)


# SIGKILL


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_runs_killed_at_10_random_moments_end_as_one_that_was_not(inputs, tmp_path, processes):
    """Bit for bit, whether all processes are killed or one of two."""
    seed = random.randrange(2**32)
    script = Path(__file__).with_name("killed_train_runs.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(inputs), str(tmp_path), str(processes), "10", str(seed)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, (seed, finished.stderr[-3000:])
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["kills"] >= 10 and result["at_work"] >= 5, seed
    expected = outcome(tmp_path / "whole")
    steps = [entry["step"] for entry in expected[0] if "loss" in entry]
    assert steps == list(range(3, 25, 3))
    for folder in range(result["folders"]):
        assert_same(tmp_path / str(folder), expected)


# SIGTERM and SIGUSR1


def launch(launcher, arguments):
    return subprocess.Popen(
        [*launcher, *arguments], env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_to_the_end(launcher, arguments):
    process = launch(launcher, arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return errors


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.005)


def assert_interrupted(folder, name, printed):
    """The file, the line and the checkpoint of a run that ended well, and nothing of a run that has finished."""
    left = json.loads((folder / "interrupted.json").read_text())
    step = left["step"]
    assert left == {"step": step, "signal": name, "checkpoint": str(folder / f"checkpoint-{step}")}
    assert 4 <= step < 24 and (folder / f"checkpoint-{step}" / "manifest.json").is_file()
    lines = [line for line in printed.splitlines() if "interrupted by" in line]
    assert lines == [
        f"interrupted by {name} at step {step}; go on with --resume_from_checkpoint {folder}/checkpoint-{step}"
    ]
    assert not {"model.safetensors", "metrics.json", "run.json"} & {path.name for path in folder.iterdir()}


def assert_resumed(launcher, inputs, folder, expected):
    errors = run_to_the_end(launcher, flags(inputs, folder, resume_from_checkpoint="true"))
    assert "resumed with" not in errors and "not whole" not in errors
    assert_same(folder, expected)
    assert not (folder / "interrupted.json").exists()


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "run"
    run_to_the_end(ONE, flags(inputs, folder))
    return outcome(folder)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_go_saves_and_goes_on_later(inputs, tmp_path, expected, asked):
    process = launch(ONE, flags(inputs, tmp_path / "run"))
    wait_for(process, tmp_path / "run" / "checkpoint-4")
    process.send_signal(asked)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-3000:]
    assert_interrupted(tmp_path / "run", asked.name, printed)
    assert_resumed(ONE, inputs, tmp_path / "run", expected)


@pytest.fixture(scope="module")
def expected_of_two(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected_of_two") / "run"
    run_to_the_end(TWO, flags(inputs, folder))
    return outcome(folder)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "workers", "one_worker", "all"])
def test_two_processes_save_at_the_same_step(inputs, tmp_path, expected_of_two, to):
    """Whoever gets the signal: the launcher hands it on, and a cluster sends it to launcher and workers alike."""
    process = launch(TWO, flags(inputs, tmp_path / "run"))
    wait_for(process, tmp_path / "run" / "checkpoint-4")
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for one in {"torchrun": [], "workers": workers, "one_worker": workers[1:], "all": workers}[to]:
        one.send_signal(signal.SIGTERM)
    if to in ("torchrun", "all"):
        process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    # torchrun itself calls every SIGTERM that it gets a failure
    assert (process.returncode == 0) == (to in ("workers", "one_worker")), errors[-3000:]
    assert_interrupted(tmp_path / "run", "SIGTERM", printed)
    assert_resumed(TWO, inputs, tmp_path / "run", expected_of_two)


@on_cpu
@pytest.mark.slow
def test_torchrun_that_loses_a_process_ends_and_goes_on(inputs, tmp_path, expected_of_two):
    process = launch(TWO, flags(inputs, tmp_path / "run"))
    wait_for(process, tmp_path / "run" / "checkpoint-4")
    psutil.Process(process.pid).children()[1].kill()
    process.communicate(timeout=120)
    assert process.returncode == 1
    run_to_the_end(TWO, flags(inputs, tmp_path / "run"))
    assert_same(tmp_path / "run", expected_of_two)


@on_cpu
@pytest.mark.slow
def test_a_run_that_is_asked_to_go_before_it_trains_ends_well_too(inputs, tmp_path, expected):
    process = launch(ONE, flags(inputs, tmp_path / "run"))
    wait_for(process, tmp_path / "run" / "data")
    process.terminate()
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-3000:]
    assert "interrupted by SIGTERM outside the training; go on with --resume_from_checkpoint auto" in printed
    left = json.loads((tmp_path / "run" / "interrupted.json").read_text())
    assert left == {"step": 0, "signal": "SIGTERM", "checkpoint": None}
    run_to_the_end(ONE, flags(inputs, tmp_path / "run"))
    assert_same(tmp_path / "run", expected)
