"""Runs of a tiny lens that are cut short, and what must be the same in the end."""

from pathlib import Path
from typing import Any

from lens_runs import tiny_trainer
from transformers import TrainerCallback

from consistency_lens.training.trainer import ConsistencyLensTrainer

# Stages of every kind that end between two checkpoints, as do epochs (of 9 steps) and logs.
SETTINGS: dict[str, Any] = {
    "stages": ["warm_start 5s", "gumbel 3s", "policy_gradient"], "max_steps": 13, "logging_steps": 3,
    "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1,
}  # fmt: skip
# how the names of figures end that are of this run of the machine
TIMES = ("seconds", "peak_memory_gb", "_per_second", "runtime")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class DiesAt(TrainerCallback):
    """Kills the run at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def tiny_run(folder: Path, **changes: Any) -> ConsistencyLensTrainer:
    """A trainer of a lens with adapters and dropout, which draws from the global generator at every step."""
    settings = SETTINGS | changes
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": settings.pop("lora_dropout")}
    return tiny_trainer(folder, {"training": "lora", "lora": lora}, **settings)


def curve(trainer: ConsistencyLensTrainer) -> list[dict[str, float]]:
    """All that was logged at the steps, but for the times."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return [{name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in entries]


def tensors(trainer: ConsistencyLensTrainer) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in trainer.lens.trained_tensors().items()}
