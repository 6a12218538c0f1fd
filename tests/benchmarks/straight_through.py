"""Sampling and embedding a token with gradients: without one-hots, against `F.gumbel_softmax(hard=True) @ table`.

Both sides draw tokens, embed them and go back to the gradient of the logits; the table is frozen, as a subject's is.
Run with `python tests/benchmarks/straight_through.py`: it writes straight_through_time and straight_through_memory.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import compare, prepare, write_result

from consistency_lens.straight_through import row_keys, sample_tokens, straight_through_embedding

ROWS, VOCAB_SIZE, WIDTH, TAU = 512, 32_000, 256, 1.0
WHAT = f"forward and backward against F.gumbel_softmax(hard=True) @ table, N={ROWS} V={VOCAB_SIZE} d={WIDTH}"


def make_sides(device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """The two callables, on the same logits, table and output gradient; each returns the gradient of the logits."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCAB_SIZE, device=device, requires_grad=True)
    table = torch.randn(VOCAB_SIZE, WIDTH, device=device)
    grad = torch.randn(ROWS, WIDTH, device=device)
    keys = row_keys(seed=0, step=0, rows=torch.arange(ROWS, device=device))

    def ours() -> torch.Tensor:
        embedded = straight_through_embedding(logits, sample_tokens(logits, keys), keys, table, TAU)
        return torch.autograd.grad(embedded, logits, grad)[0]

    def theirs() -> torch.Tensor:
        return torch.autograd.grad(F.gumbel_softmax(logits, TAU, hard=True) @ table, logits, grad)[0]

    return {"ours": ours, "theirs": theirs}


def peak_mebibytes(side: str, device: torch.device) -> float:
    """The most memory that one call takes beyond its inputs. On a CPU it must be the first call of its process."""
    function = make_sides(device)[side]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _memory_of_process("VmRSS")
    function()
    return (_memory_of_process("VmHWM") - before) / 1024


def _memory_of_process(field: str) -> int:
    """A field of the process's status in kibibytes. (`ru_maxrss` would include the peak of the process's parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_in_fresh_process(side: str, device: torch.device) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_mebibytes, side, device).result()


def main() -> None:
    """Times both sides in turn, then measures the peak memory of each in a process of its own."""
    device = prepare()
    sides = make_sides(device)
    compare("straight_through_time", WHAT, sides["ours"], sides["theirs"], device)
    ours, theirs = (peak_in_fresh_process(side, device) for side in ("ours", "theirs"))
    write_result("straight_through_memory", f"peak beyond inputs, {WHAT}", "MiB", ours, theirs, 1, device)


if __name__ == "__main__":
    main()
