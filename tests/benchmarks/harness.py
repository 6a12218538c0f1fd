"""Interleaved timing of two callables, and the result file that every benchmark writes."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"  # of what was measured on GPUs
# One is fairer than two where others are at work on the machine.
NUM_THREADS = int(os.environ.get("BENCHMARK_THREADS", "2"))
# Large logits are otherwise mapped and unmapped at every step, which drowns what is measured.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def prepare() -> torch.device:
    """Restarts the process under the malloc settings if needed, sets the threads, and returns the device to use."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(NUM_THREADS)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, to the end of its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    name: str, what: str, ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device, runs: int = 9
) -> dict[str, Any]:
    """Times both callables in turn, `runs` times each after two warm-up calls, and writes the medians.

    Returns:
        What was written; `ratio` is theirs / ours, so above 1 means that ours is faster.
    """
    medians = interleaved({"ours": ours, "theirs": theirs}, device, runs)
    return write_result(name, what, "seconds", medians["ours"], medians["theirs"], runs, device)


def interleaved(
    sides: dict[str, Callable[[], Any]], device: torch.device, runs: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each callable by name, of `runs` calls after `warmup` others, all in turn."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for run in range(-warmup, runs):
        # The order changes, so that neither side always runs on the other's warm cache.
        for side in sorted(sides, reverse=bool(run % 2)):
            elapsed = seconds(sides[side], device)
            if run >= 0:
                times[side].append(elapsed)
    return {side: statistics.median(values) for side, values in times.items()}


def write_result(
    name: str,
    what: str,
    unit: str,
    ours: float,
    theirs: float,
    runs: int,
    device: torch.device,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Writes `<name>.json` for a quantity of which less is better; into `results`, on a GPU `results/gpu`, if not into
    a `folder`."""
    result = {
        "name": name,
        "what": what,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": theirs / ours,
        "runs": runs,
        "machine": machine(device),
        "versions": versions(),
    }
    usual = RESULTS / "gpu" if device.type == "cuda" else RESULTS
    path = (folder or usual) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"{name}: {theirs:.4g} -> {ours:.4g} {unit}, {result['ratio']:.2f}x ({what})\n")
    return result


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and settings that a result depends on."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "malloc": MALLOC}


def versions() -> dict[str, str]:
    """What a result was measured with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
