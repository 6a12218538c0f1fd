"""Fits of a tuned lens on a tiny subject: their inputs, their arguments, and what they leave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.tuned_lens.fit import FitResult, fit_tuned_lens
from consistency_lens.tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments

SEQ_LEN, BATCH, ACCUMULATION = 16, 4, 2
RIDGE_BLOCKS, TRAIN_BLOCKS, STEPS = 14, 38, 10
# 38 blocks after those of the closed form: 10 passes, the last of 2 blocks, in 5 steps an epoch
FIT: dict[str, Any] = {
    "seq_len": SEQ_LEN,
    "tokens": (RIDGE_BLOCKS + TRAIN_BLOCKS) * SEQ_LEN,
    "validation_tokens": 4 * SEQ_LEN,
    "validation_fraction": 0.2,
    "ridge_tokens": RIDGE_BLOCKS * SEQ_LEN,
    "rank": "4",
}
TRAINING: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "position_range": [0.0, 1.0],
    "positions_per_sequence": "6",
    "layers_per_step": "1",
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def write_inputs(folder: Path) -> Path:
    """A subject and a text, in a folder."""
    tiny_model("llama").save_pretrained(folder / "subject")
    tiny_tokenizer().save_pretrained(folder / "subject")
    draws = np.random.default_rng(0)
    rows = [" ".join(f"w{n}" for n in draws.integers(3, 97, size=14)) for _ in range(90)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def arguments(inputs: Path, folder: Path, **changes: Any) -> tuple[FitArguments, TunedLensTrainingArguments]:
    """Arguments of a small fit, with changes."""
    named = {"model": str(inputs / "subject"), "dataset": str(inputs / "text.jsonl"), **FIT}
    own = {name: changes.pop(name) for name in list(changes) if name in FitArguments.__dataclass_fields__}
    return FitArguments(**{**named, **own}), TunedLensTrainingArguments(
        **{**TRAINING, "output_dir": str(folder), **changes}
    )


def run_fit(inputs: Path, folder: Path, **changes: Any) -> FitResult:
    """Fits a lens."""
    return fit_tuned_lens(*arguments(inputs, folder, **changes))


def flags(inputs: Path, folder: Path, **changes: Any) -> list[str]:
    """The same on a command line."""
    settings = {"model": inputs / "subject", "dataset": inputs / "text.jsonl", "output_dir": folder, **FIT, **TRAINING}
    words = []
    for name, value in {**settings, **changes}.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def artifact(folder: Path) -> dict[str, bytes]:
    """The bytes that two fits with the same arguments have in common."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "provenance.json", "config.json")}
