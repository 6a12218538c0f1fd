"""Runs `consistency-lens tuned-lens fit` in processes that are killed at random moments, until enough of them were.

The processes are forked from one that has imported everything, so that the kills fall into their work.
Arguments: folder of the inputs, folder for the fits, kills, seed.
"""

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch
from tuned_fits import flags

from consistency_lens.cli.tuned_lens.fit import main
from consistency_lens.tuned_lens import fit

torch.set_num_threads(1)
fork = multiprocessing.get_context("fork")
inputs, root, wanted, draw = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
fit.KEEP_EVERY = 1


def start(folder):
    process = fork.Process(target=lambda: sys.exit(main(flags(inputs, folder))))
    process.start()
    return process


begin = time.monotonic()
process = start(root / "whole")
process.join()
assert process.exitcode == 0
seconds = time.monotonic() - begin
folder, kills, found = 0, 0, {"ridge": 0, "checkpoint-*": 0}
while kills < wanted or min(found.values()) < wanted // 4:
    process = start(root / str(folder))
    process.join(draw.uniform(0, seconds))
    if process.exitcode is None:
        process.kill()
        process.join()
        kills += 1
        for name in found:
            found[name] += any((root / str(folder)).glob(name))
    else:
        assert process.exitcode == 0
        folder += 1
for number in range(folder + 1):
    process = start(root / str(number))
    process.join()
    assert process.exitcode == 0
print(json.dumps({"folders": folder + 1, "kills": kills, "found": found}))
