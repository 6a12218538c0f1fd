"""The cache command in processes of its own: two ranks, SIGKILL, and disks that are full."""

import json
import os
import random
import resource
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest
import torch
from cache_runs import ENVIRONMENT, ROOT, content, flags, text, write_subject

from consistency_lens.cli.cache import main
from consistency_lens.cli.tokenize import main as tokenize
from consistency_lens.data.activation_cache import ActivationCache

SCRIPT = str(ROOT / "examples" / "cache_activations.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
SETTINGS = {"max_norm": 4}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="several processes on the CPU")


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "subject"
    write_subject(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(subject_folder):
    path = subject_folder.parent / "stories.txt"
    path.write_text(text(150))
    return path


@pytest.fixture(scope="module")
def expected(subject_folder, text_file, tmp_path_factory):
    """What one process writes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("expected")
    assert main(flags(subject_folder, text_file, folder, 0, 1, **SETTINGS)) == 0
    found = content(folder)
    assert len([name for name in found if name.endswith(".arrow")]) > 60
    return found


def unfinished(folder):
    """The folders of caches that are begun and not whole; none of them may be opened."""
    begun = {file.parent for file in folder.rglob("building.json")}
    found = [path for path in begun if not (path / "provenance.json").is_file()]
    for path in found:
        with pytest.raises(ValueError, match="an unfinished cache"):
            ActivationCache.open(path)
    return found


# Two ranks


def launch(launcher, arguments):
    return subprocess.Popen(
        [*launcher, SCRIPT, *arguments],
        env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_to_the_end(launcher, arguments):
    """The lines that a run prints, by the first process alone."""
    process = launch(launcher, arguments)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed.splitlines()


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_write_what_one_writes(subject_folder, text_file, tmp_path, expected, launcher):
    printed = run_to_the_end(launcher, flags(subject_folder, text_file, tmp_path, 0, 1, **SETTINGS))
    assert len([line for line in printed if " rows of " in line]) == 4
    assert content(tmp_path) == expected


def kill_after(process, folder, num_shards):
    """Kills a launcher and all its processes once they have written some shards; True if it was still at work."""
    while len(list(folder.rglob("shard-*.json"))) < num_shards:
        if process.poll() is not None:
            return False
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    assert len(family) >= 3
    for member in family:
        member.kill()
    process.communicate(timeout=60)
    psutil.wait_procs(family, timeout=60)
    return True


@on_cpu
@pytest.mark.slow
def test_two_processes_that_are_killed_end_as_one_that_was_not(subject_folder, text_file, tmp_path, expected):
    arguments = flags(subject_folder, text_file, tmp_path, 0, 1, **SETTINGS)
    for num_shards in (5, 31):
        assert kill_after(launch(TORCHRUN, arguments), tmp_path, num_shards)
        assert unfinished(tmp_path)
    run_to_the_end(TORCHRUN, arguments)
    assert content(tmp_path) == expected


# SIGKILL


# Runs the command in processes that have imported everything already, so that kills fall into its work.
KILLED_RUNS = """
import json, multiprocessing, random, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from cache_runs import flags
from consistency_lens.cli.cache import main
from consistency_lens.data import cache_building, subject_loading, tokenization

def start(folder):
    process = fork.Process(target=lambda: sys.exit(main(flags(*sys.argv[1:3], folder, 0, 1, max_norm=4))))
    process.start()
    return process

root, draw = Path(sys.argv[3]), random.Random(int(sys.argv[4]))
fork = multiprocessing.get_context("fork")
begin = time.perf_counter()
start(root / "whole").join()
seconds = time.perf_counter() - begin
folder, kills, half_built = 0, 0, 0
while kills < 20 or half_built < 5:
    process = start(root / str(folder))
    process.join(draw.uniform(0, seconds))
    if process.is_alive():
        process.kill()
        process.join()
        kills += process.exitcode == -9
        half_built += any(root.glob(f"{folder}/**/shard-*.json"))
    else:
        folder += 1
for number in range(folder + 1):
    process = start(root / str(number))
    process.join()
    assert process.exitcode == 0
print(json.dumps({"folders": folder + 1, "kills": kills, "half_built": half_built}))
"""


@pytest.mark.slow
def test_runs_killed_at_20_random_moments_end_as_one_that_was_not(subject_folder, text_file, tmp_path, expected):
    seed = random.randrange(2**32)
    finished = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, str(subject_folder), str(text_file), str(tmp_path), str(seed)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["kills"] >= 20 and result["half_built"] >= 5
    for folder in ["whole", *map(str, range(result["folders"]))]:
        assert content(tmp_path / folder) == expected, (seed, folder)


# Full disks


class Room:
    """A folder on a disk with little room, and a way to make more."""

    def __init__(self, folder, limited, free):
        self.folder, self.limited, self.free = folder, limited, free


@contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_limit():
    yield


def mount(options, folder):
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(params=["tmpfs", "file_size_limit"])
def small(request, tmp_path):
    """A folder where less than the whole can be written: a small tmpfs, or files that may not grow."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "file_size_limit":
        yield Room(folder, lambda: file_size_limit(2500), lambda: None)
        return
    if not mount("size=56k", folder):
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield Room(folder, no_limit, lambda: mount("remount,size=64m", folder))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(subject_folder, text_file, small, expected, capsys):
    arguments = flags(subject_folder, text_file, small.folder / "caches", 0, 1, **SETTINGS)
    with small.limited():
        assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: activation cache: cannot write to '") and "run the same again" in last
    assert "No space left on device" in last or "File too large" in last
    assert unfinished(small.folder)
    small.free()
    assert main(arguments) == 0
    assert content(small.folder / "caches") == expected


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_full_disk_leaves_no_corpus(subject_folder, text_file, small, capsys, num_proc):
    arguments = ["--dataset", str(text_file), "--model", str(subject_folder), "--num_proc", str(num_proc)]
    output = ["--output_dir", str(small.folder / "corpus"), "--max_length", "16"]
    with small.limited():
        assert tokenize([*arguments, *output]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: corpus: cannot write to '") and (
        "No space left on device" in last or "File too large" in last
    )
    assert list(small.folder.iterdir()) == []
    small.free()
    assert tokenize([*arguments, *output]) == 0
