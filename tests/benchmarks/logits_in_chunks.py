"""A training step with few rows of logits at a time (`--logits_chunk_size`) against one with all: FLOPs and memory.

The step, its models and its batches are those of `training_step`. Both counts are of tensors and the same on every
machine: FLOPs of matrix products with fully trained clones, and the most bytes of tensors alive with adapters, the
large model with a vocabulary of 128,000.

Run with `python tests/benchmarks/logits_in_chunks.py`; it writes `logits_in_chunks_flops`, `logits_in_chunks_memory`
and, for the embedded model, `<name>_tiny_stories`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import prepare, write_result
from training_step import (
    LENGTH,
    LM_WEIGHT,
    NUM_TEXT_TOKENS,
    SETTINGS,
    Setting,
    check_models,
    make_batch,
    our_losses,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from flop_count import flops  # noqa: E402
from live_bytes import peak_bytes  # noqa: E402

from consistency_lens import ConsistencyLensModel  # noqa: E402

CHUNK_SIZE, FLOPS_BATCH, MEMORY_BATCH, LARGE_VOCABULARY = 64, 2, 64, 128_000
SIZES = (CHUNK_SIZE, 0)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def step_of(lens: ConsistencyLensModel, batch_size: int, chunk_size: int) -> Callable[[], None]:
    """A step, forward and backward."""
    losses = our_losses(lens, make_batch(lens, batch_size, 1, last=True), chunk_size=chunk_size)

    def step() -> None:
        terms = losses()
        (LM_WEIGHT * terms["lm"] + terms["kl"]).backward()

    return step


def measure_flops(setting: Setting, device: torch.device) -> None:
    """Writes what a step of fully trained clones costs for each activation."""
    lens = setting.make_lens().to(device)
    check_models(lens)
    counts = [flops(step_of(lens, FLOPS_BATCH, size)) / FLOPS_BATCH for size in SIZES]
    what = f"a step's matrix products, {shape_of(lens)}, {CHUNK_SIZE} rows of logits at a time against all"
    write_result(f"logits_in_chunks_flops{setting.suffix}", what, "FLOPs an activation", *counts, 1, device)


def measure_memory(setting: Setting, device: torch.device) -> None:
    """Writes what a step holds where adapters are trained, beside weights and gradients."""
    lens = setting.make_lens(LARGE_VOCABULARY, training="lora", lora=LORA).to(device)
    check_models(lens)
    for parameter in lens.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    known = torch.nn.ModuleList([lens, lens.subject.model])
    peaks = [peak_bytes(step_of(lens, MEMORY_BATCH, size), known) for size in SIZES]
    what = (
        f"what a step holds beside weights and gradients, adapters, {shape_of(lens)} B={MEMORY_BATCH}, "
        f"{CHUNK_SIZE} rows of logits at a time against all"
    )
    write_result(f"logits_in_chunks_memory{setting.suffix}", what, "bytes", *peaks, 1, device)


def shape_of(lens: ConsistencyLensModel) -> str:
    """Layer and sizes, in words."""
    vocabulary = lens.subject.model.config.vocab_size
    return f"layer {lens.config.layer}, S={LENGTH} T={NUM_TEXT_TOKENS} V={vocabulary:,}"


def main() -> None:
    """Measures both models."""
    device = prepare()
    for setting in SETTINGS:
        measure_flops(setting, device)
        measure_memory(setting, device)


if __name__ == "__main__":
    main()
