"""Calls of `consistency-lens train` on a tiny subject: its flags, and what a run comes to in the end."""

import json
from pathlib import Path

from cache_runs import text, write_subject
from safetensors.torch import load_file

STAGES = ["warm_start 10s", "gumbel 8s", "policy_gradient"]
# how the names of figures end that are of this run of the machine
TIMES = ("seconds", "peak_memory_gb", "_per_second", "runtime")


def write_inputs(folder):
    """The subject and the text of all runs."""
    write_subject(folder)
    (folder / "text.txt").write_text(text(24))


def flags(inputs, output_dir, **changes):
    settings = {
        "model": inputs, "dataset": Path(inputs) / "text.txt", "output_dir": output_dir, "layer": 1, "min_position": 4,
        "num_text_tokens": 3, "max_length": 16, "positions_per_sequence": 2, "validation_fraction": 0.2,
        "clones": "lora", "lora_rank": 2, "eval_rows": 8, "num_samples": 2, "max_steps": 24, "save_steps": 2,
        "save_total_limit": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 3,
        "eval_strategy": "steps", "eval_steps": 8, "interim_eval_rows": 8, "sample_steps": 7, "tracked_samples": 4,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "resume_from_checkpoint": "auto",
    } | changes  # fmt: skip
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*arguments, "--stages", *STAGES]


def outcome(folder):
    """(the curves without times, the final tensors, the sample tables) of a finished run."""
    entries = json.loads((folder / "log_history.json").read_text())
    curves = [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)}
        for entry in entries
        if "train_runtime" not in entry
    ]
    return curves, load_file(folder / "model.safetensors"), (folder / "sample_tables.jsonl").read_text()
