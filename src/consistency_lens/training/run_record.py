"""What a run writes about itself beside its figures, for cards and reports."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import torch

from ..hub.provenance import git_commit, package_versions
from .arguments import ConsistencyLensTrainingArguments
from .recipe_arguments import RecipeArguments

# What decides the weights of a lens.
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "numpy", "safetensors", "huggingface_hub")
# Where a run is and what it shows, whatever it trains; and what is set for every lens, or by the machine.
NOT_OF_THE_LENS = {"output_dir", "use_cpu", "disable_tqdm", "report_to", "run_name", "project", "local_rank"}
NOT_OF_THE_LENS |= {"dataloader_pin_memory", "accelerator_config", "remove_unused_columns", "dry_run", "hub_token"}
NOTHING = ("None", "False", "", "no", "none", "[]", "{}")


def run_record(
    recipe: RecipeArguments, training: ConsistencyLensTrainingArguments, steps: int, laps: Mapping[str, float]
) -> dict[str, Any]:
    """What `run.json` says beside the resolved arguments.

    Args:
        steps: optimizer steps that were taken.
        laps: wall seconds of each part.
    """
    rows = training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps
    return {
        "seconds": sum(laps.values()),
        "laps": dict(laps),
        "machine": machine(training),
        "steps": steps,
        "rows_per_step": rows,
        "non_default": non_default(recipe) | non_default(training),
    }


def machine(training: ConsistencyLensTrainingArguments) -> dict[str, Any]:
    """What a run ran on."""
    device = training.device
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **gpu,
        "processes": training.world_size,
    }


def software() -> dict[str, Any]:
    """Versions of what made a lens, and the commit of this package's source."""
    return {"versions": package_versions(PACKAGES), "git_commit": git_commit()}


def non_default(arguments: RecipeArguments | ConsistencyLensTrainingArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults and say something of the lens, in what JSON can hold."""
    values = arguments.to_dict() if isinstance(arguments, ConsistencyLensTrainingArguments) else vars(arguments)
    own = [item for item in fields(arguments) if item.init and item.name not in NOT_OF_THE_LENS]
    return {item.name: values[item.name] for item in own if _differs(values[item.name], default_of(item))}


def default_of(item: Field) -> Any:
    """The default of a field; None where it has none."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def _differs(value: Any, default: Any) -> bool:
    # as text, for 0 equals False
    return value != default and not (str(value) in NOTHING and str(default) in NOTHING)
