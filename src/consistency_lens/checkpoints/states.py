"""Optimizer, scheduler, random and other states on disk without pickle: tensors in safetensors, the rest in JSON."""

import json
import math
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic_write import write_json, write_tensors
from .manifest import MANIFEST_FILE

OPTIMIZER_TENSORS, OPTIMIZER_JSON = "optimizer.safetensors", "optimizer.json"
SCHEDULER_JSON = "scheduler.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointWriteError(OSError):
    """Raised when a checkpoint cannot be written, with what to do; those before it stay as they are."""


def checkpoints_in(output_dir: Path) -> dict[int, Path]:
    """Step -> folder of each checkpoint of a run, whole or not, in the order of their steps."""
    folders = [path for path in output_dir.iterdir() if path.is_dir()] if output_dir.is_dir() else []
    named = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in folders)
    return dict(sorted((int(match[1]), path) for match, path in named if match is not None))


def remove_torn(output_dir: Path, up_to: int) -> None:
    """Removes what killed runs left of checkpoints of steps up to `up_to`, of which there is a newer whole one."""
    for step, path in checkpoints_in(output_dir).items():
        if step <= up_to and not (path / MANIFEST_FILE).is_file():
            shutil.rmtree(path)


class Kept(Protocol):
    """What a checkpoint keeps beside model, optimizer and schedules; every process has the same of it."""

    def state(self) -> Mapping[str, Any]:
        """All that a resumed run has to know: tensors, and what JSON takes."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, tensors on the CPU."""
        ...


def save_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Writes `<name>.json`, and `<name>.safetensors` where there are tensors."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if tensors:
        write_tensors(folder / f"{name}.safetensors", tensors)
    rest = {key: value for key, value in state.items() if key not in tensors}
    write_json(folder / f"{name}.json", {"tensors": bool(tensors), "values": rest})


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Reads what `save_state` wrote."""
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / f"{name}.safetensors") if content["tensors"] else {}
    return {**content["values"], **tensors}


def save_optimizer(state: Mapping[str, Any], folder: Path) -> None:
    """Writes an optimizer's `state_dict`: `<index>.<name>` tensors, and everything that is no tensor as JSON.

    Tensors that lie one deeper, as those of optimizers in 8 bits do, are `<index>.<name>/<part>`.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif isinstance(value, Mapping) and all(isinstance(part, Tensor) for part in value.values()):
                # copies, for several parameters have one table of the numbers that 8 bits stand for
                tensors |= {f"{index}.{name}/{key}": part.clone() for key, part in value.items()}
            else:
                scalars.setdefault(str(index), {})[name] = value
    write_tensors(folder / OPTIMIZER_TENSORS, tensors)
    write_json(folder / OPTIMIZER_JSON, {"param_groups": state["param_groups"], "scalars": scalars})


def read_optimizer(optimizer: Any, folder: Path) -> dict[str, Any]:
    """Reads what `save_optimizer` wrote, for that optimizer's `load_state_dict`.

    Raises:
        ValueError: if the checkpoint trained another set of parameter groups.
    """
    saved = json.loads((folder / OPTIMIZER_JSON).read_text(encoding="utf-8"))
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own_sizes:
        raise ValueError(
            f"checkpoint: parameter groups of sizes {sizes}, the run has {own_sizes}; resume the same recipe"
        )
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in saved["scalars"].items()}
    for key, tensor in load_file(folder / OPTIMIZER_TENSORS).items():
        index, name = key.split(".", 1)
        name, _, part = name.partition("/")
        entries = state.setdefault(int(index), {})
        if part:
            entries.setdefault(name, {})[part] = tensor
        else:
            entries[name] = tensor
    return {"state": state, "param_groups": saved["param_groups"]}


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Writes a learning-rate scheduler's counters (its functions are rebuilt from the arguments)."""
    state = {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}
    # what is infinite is so in a new scheduler too: the best figure before there is any
    finite = {k: v for k, v in state.items() if not isinstance(v, float) or math.isfinite(v)}
    write_json(folder / SCHEDULER_JSON, finite)


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """Reads what `save_scheduler` wrote; the functions of `scheduler` stay."""
    saved = json.loads((folder / SCHEDULER_JSON).read_text(encoding="utf-8"))
    current = scheduler.state_dict()
    scheduler.load_state_dict({**current, **saved})


def random_state_file(process_index: int, extension: str) -> str:
    """The name of one process's random states."""
    return f"rng_state_{process_index}.{extension}"


def save_random_states(folder: Path, process_index: int) -> None:
    """Writes the states of python's, numpy's and torch's generators (all CUDA devices too) of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(numpy_keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    write_tensors(folder / random_state_file(process_index, "safetensors"), tensors)
    content = {"python": random.getstate(), "numpy": [numpy_name, *numpy_rest]}
    write_json(folder / random_state_file(process_index, "json"), content)


def load_random_states(folder: Path, process_index: int) -> bool:
    """Restores what `save_random_states` wrote; False if this process has no saved states."""
    path = folder / random_state_file(process_index, "json")
    if not path.is_file():
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(folder / random_state_file(process_index, "safetensors"))
    version, internal, gauss = content["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_name, *numpy_rest = content["numpy"]
    np.random.set_state((numpy_name, tensors["numpy"].numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{i}"] for i in range(len(tensors) - 2)]
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
    return True
