"""What runs on a CPU runs on another device, though there is none here: see `pretend_device`."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_runs import CASES, everything

PROGRAM = Path(__file__).with_name("pretended_runs.py")


def everything_there(folder):
    paths = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(PROGRAM), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


# one test, for two would train all of it twice where they run in processes of their own
def test_on_another_device_no_tensor_meets_one_of_the_cpu_and_losses_texts_and_figures_are_the_same(tmp_path):
    here, there = everything(tmp_path / "here"), everything_there(tmp_path / "there")
    assert (here.pop("device"), there.pop("device")) == ("cpu", "pretend")
    # where each device rounds otherwise
    assert all(math.isfinite(loss) for loss in (*here.pop("bfloat16"), *there.pop("bfloat16")))
    for case in CASES.keys() & here.keys():
        assert len(here[case]) > 1 and there.pop(case) == pytest.approx(here.pop(case), rel=1e-3), case
    assert here.keys() == there.keys() == {"explanation", "figures"}
    assert here["explanation"] == there["explanation"]
    assert rounded(here["figures"]) == rounded(there["figures"])


def rounded(value):
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value
