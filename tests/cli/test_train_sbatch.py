"""The batch script of the training, run by bash with a recorded Slurm and processes that behave as training does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consistency_lens.cli.jobs import TRAIN_SCRIPT

# A step of one task; `squeue` and `scontrol` as Slurm 22.05 answered. A requeue ends all processes of a job.
PROGRAMS = {
    "srun": """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
""",
    "scontrol": """#!/bin/bash
if [[ $1 == show ]]; then echo node7; exit; fi
printf '%s\\n' "$*" >> "$CALLS/scontrol"
kill -TERM 0
""",
    "squeue": """#!/bin/bash
echo "$JOB_STATE"
""",
    # What is looked at every half second is looked at five times as often.
    "sleep": """#!/bin/bash
exec /bin/sleep "${1/#0.5/0.1}"
""",
    # A launcher that starts two processes, or one process alone. Each has a child that must be left alone, and one
    # that is told twice, or before it listens, does not come to a good end.
    "python": """#!{python}
import json, os, pathlib, signal, subprocess, sys, time
calls, out = pathlib.Path(os.environ["CALLS"]), pathlib.Path(os.environ["OUTPUT_DIR"])
if "torch.distributed.run" in sys.argv and "RANK" not in os.environ:
    ranks = [subprocess.Popen(sys.argv, env={{**os.environ, "RANK": str(rank)}}) for rank in range(2)]
    sys.exit(max(rank.wait() for rank in ranks))
rank = os.environ.get("RANK", "0")
(calls / f"argv{{rank}}").write_text(json.dumps(sys.argv[1:]))
told, ends = [], []
time.sleep(float(os.environ["LOADING"]))
if os.environ["BEHAVIOUR"] == "fails":
    sys.exit(7)
if os.environ["BEHAVIOUR"] == "finishes":
    sys.exit(0)
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
loader = os.fork()
if loader == 0:
    told.clear()
    while not told:
        time.sleep(0.05)
    (calls / "loader_told").touch()
    os._exit(0)
(calls / f"listens{{rank}}").touch()
while not told:
    time.sleep(0.05)
time.sleep(0.6)
assert len(told) == 1, told
os.kill(loader, signal.SIGKILL)
saved = None if os.environ["BEHAVIOUR"] == "saves nothing" else "checkpoint-3"
(out / "interrupted.json").write_text(json.dumps({{"checkpoint": saved}}))
(calls / f"saved{{rank}}").touch()
""",
}


@pytest.fixture
def start(tmp_path):
    """Starts the script as a job, with the arguments of the training."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.mkdir()
    for name, text in PROGRAMS.items():
        text = text.format(python=sys.executable) if name == "python" else text
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    jobs = []

    def start(behaviour="waits", **environment):
        job = subprocess.Popen(
            ["bash", str(TRAIN_SCRIPT), "--config", "recipe.yaml"],
            env={
                "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "OUTPUT_DIR": str(tmp_path / "run"),
                "PYTHON": str(programs / "python"), "BEHAVIOUR": behaviour, "LOADING": "0", "JOB_STATE": "RUNNING",
                "SLURM_JOB_ID": "25", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "1", **environment,
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        job.wait()


def wait_for(*files):
    end = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, files
        time.sleep(0.05)


def processes_of(job):
    """The processes of the job's session."""
    everyone = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in everyone if session_of(pid) == job.pid]


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_time_is_nearly_up_saves_and_goes_back_into_the_queue(start, tmp_path, processes):
    calls = tmp_path / "calls"
    job = start(PROCESSES=str(processes), LOADING="0.5")
    wait_for(calls / "srun")
    job.send_signal(signal.SIGUSR1)  # before anything listens
    output = job.communicate(timeout=60)[0]
    assert job.returncode == -signal.SIGTERM  # of the requeue
    assert all((calls / f"saved{rank}").exists() for rank in range(processes)), output
    assert (calls / "scontrol").read_text() == "requeue 25\n"
    assert "back into the queue" in output
    assert not (calls / "loader_told").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["interrupted.json"]


def test_a_training_that_begins_to_listen_while_its_children_are_looked_up_is_told_itself(start, tmp_path):
    calls = tmp_path / "calls"
    slow = tmp_path / "bin" / "cat"
    slow.write_text('#!/bin/bash\nwhile [[ ! -e $CALLS/listens0 ]]; do /bin/sleep 0.05; done\nexec /bin/cat "$@"\n')
    slow.chmod(0o755)
    job = start(LOADING="1")
    wait_for(calls / "argv0")
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert (calls / "saved0").exists(), output
    assert not (calls / "loader_told").exists()


def test_a_job_that_was_requeued_goes_on_from_its_checkpoint(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "interrupted.json").write_text("{}")
    job = start("finishes", SLURM_RESTART_COUNT="1")
    job.communicate(timeout=60)
    assert job.returncode == 0 and not (tmp_path / "calls" / "scontrol").exists()
    argv = json.loads((tmp_path / "calls" / "argv0").read_text())
    common = ["-m", "consistency_lens", "train", "--config", "recipe.yaml", "--output_dir", str(tmp_path / "run")]
    assert argv == [*common, "--resume_from_checkpoint", "auto"]


def test_a_job_that_was_cancelled_saves_and_stays_away(start, tmp_path):
    calls = tmp_path / "calls"
    job = start(JOB_STATE="COMPLETING")
    wait_for(calls / "listens0")
    # to the task of the node, as Slurm does where it tracks processes by cgroups; and to the script
    for pid in processes_of(job):
        if "run_on_node" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGTERM)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 1 and (calls / "saved0").exists(), output
    assert "goes on from its last checkpoint" in output
    assert not (calls / "scontrol").exists()


def test_a_job_without_time_to_get_anywhere_is_not_started_again_for_ever(start, tmp_path):
    job = start("saves nothing")
    wait_for(tmp_path / "calls" / "listens0")
    job.send_signal(signal.SIGUSR1)
    assert "give the job more than --signal takes" in job.communicate(timeout=60)[0]
    assert job.returncode == 1 and not (tmp_path / "calls" / "scontrol").exists()


def test_a_failure_shows_in_the_exit_code(start, tmp_path):
    job = start("fails")
    job.communicate(timeout=60)
    assert job.returncode == 7 and not (tmp_path / "calls" / "scontrol").exists()


def test_launchers_meet_on_the_first_node(start, tmp_path):
    start("finishes", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4").communicate(timeout=60)
    argv = json.loads((tmp_path / "calls" / "argv0").read_text())
    launch = (
        "-m torch.distributed.run --nnodes 2 --node_rank 0 --nproc_per_node 4 --master_addr node7 --master_port 20025"
    )
    assert " ".join(argv).startswith(f"{launch} -m consistency_lens train --config recipe.yaml")
    step = (tmp_path / "calls" / "srun").read_text()
    assert step.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c")


def test_a_file_of_accelerate_says_how_training_is_spread(start, tmp_path):
    job = start("finishes", SLURM_NNODES="2", PROCESSES="4", ACCELERATE_CONFIG="fsdp.yaml", SRUN_FLAGS="--mpi=none")
    job.communicate(timeout=60)
    argv = " ".join(json.loads((tmp_path / "calls" / "argv0").read_text()))
    assert argv.startswith("-m accelerate.commands.launch --config_file fsdp.yaml --num_machines 2 --machine_rank 0")
    assert "--num_processes 8" in argv and "--main_process_ip node7 --main_process_port 20025" in argv
    assert "--mpi=none bash -c" in (tmp_path / "calls" / "srun").read_text()


def test_the_folder_of_the_run_has_to_be_named(start):
    job = start(OUTPUT_DIR="")
    assert "OUTPUT_DIR: is not set; pass the folder of the run" in job.communicate(timeout=60)[0]
    assert job.returncode != 0
