"""Has two gloo processes call a function, as a job of `torchrun` would.

Both are forked from one process that has imported everything, so that a job pays for one import, and they meet in a
file, so that no port can be taken: `python gloo_processes.py MODULE FUNCTION ARGUMENTS...`.
"""

import gc
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

PROCESSES = 2


def on_two_processes(work: Callable[..., None], *arguments: str | Path, seconds: int = 3000) -> None:
    """Has two processes call `work`, a function of a test's module, with these arguments as texts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, work.__module__, work.__name__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-5000:]


def call(work: Callable[..., None], arguments: list[str], rank: int, meeting_place: str) -> None:
    """What one of the processes does."""
    import torch

    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), PROCESSES)
    named = {"RANK": rank, "LOCAL_RANK": rank, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    os.environ |= {name: str(value) for name, value in named.items()}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=PROCESSES
    )
    work(*arguments)
    torch.distributed.destroy_process_group()


def main() -> None:
    module, name, *arguments = sys.argv[1:]
    work = getattr(importlib.import_module(module), name)
    gc.freeze()  # what is imported is no garbage
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            fork.Process(target=call, args=(work, arguments, rank, f"{folder}/meeting_place"), daemon=True)
            for rank in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        running = list(processes)
        while running:
            connection.wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
            if any(process.exitcode for process in processes):  # the other would wait for it
                for process in running:
                    process.kill()
                sys.exit(1)


if __name__ == "__main__":
    main()
