"""Runs `consistency-lens train` in processes that are killed at random moments, until enough of them were.

The processes are forked from one that has imported everything, so that the kills fall into their work.
Arguments: folder of the inputs, folder for the runs, number of processes, kills, seed.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

import torch
from train_runs import flags

from consistency_lens.cli.train import main
from consistency_lens.data import sources, subject_loading, summaries  # noqa: F401
from consistency_lens.evaluation import report  # noqa: F401
from consistency_lens.training import arguments, recipe  # noqa: F401

torch.set_num_threads(1)
fork = multiprocessing.get_context("fork")
inputs, root, world_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
wanted, draw = int(sys.argv[4]), random.Random(int(sys.argv[5]))


def work(folder, rank, port):
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
    sys.exit(main(flags(inputs, folder)))


def start(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork.Process(target=work, args=(folder, rank, port)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def join(processes, seconds=None):
    end = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        process.join(None if end is None else max(0, end - time.monotonic()))
    return [process.exitcode for process in processes]


begin = time.monotonic()
assert join(start(root / "whole")) == [0] * world_size
seconds = time.monotonic() - begin
folder, kills, at_work, alone, torn = 0, 0, 0, 0, 0
while kills < wanted or at_work < wanted // 2:
    processes = start(root / str(folder))
    if None not in join(processes, draw.uniform(0, seconds / world_size)):
        assert [process.exitcode for process in processes] == [0] * world_size
        folder += 1
        continue
    checkpoints = list(root.glob(f"{folder}/checkpoint-*"))
    victims = [draw.choice(processes)] if world_size > 1 and draw.random() < 0.5 else processes
    for process in victims:
        process.kill()
    # the others fail without it; where they wait for what never comes, a launcher kills them
    join(processes, 10)
    for process in processes:
        process.kill()
    join(processes)
    kills += 1
    at_work += bool(checkpoints)
    alone += len(victims) < len(processes)
    torn += any(not (path / "manifest.json").is_file() for path in root.glob(f"{folder}/checkpoint-*"))
for number in range(folder + 1):
    assert join(start(root / str(number))) == [0] * world_size
print(json.dumps({"folders": folder + 1, "kills": kills, "at_work": at_work, "alone": alone, "torn": torn}))
