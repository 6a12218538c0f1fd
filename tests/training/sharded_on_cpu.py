"""Makes FSDP2 and DeepSpeed spread weights over processes on a CPU, where accelerate would run plain DDP instead."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def use(strategy: str, folder: Path) -> dict[str, Any]:
    """Does what `accelerate launch` would for a strategy, before any training arguments are made.

    Args:
        strategy: "ddp", "fsdp2", "zero2", "zero3" or "zero3_offload".
        folder: for a configuration of DeepSpeed.

    Returns:
        Training arguments that belong to it.
    """
    for name in (*FSDP2, *DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_TORCH_DEVICE"):
        os.environ.pop(name, None)
    if strategy == "ddp":
        return {"use_cpu": True}
    if strategy == "fsdp2":
        os.environ |= FSDP2
    else:
        # without thresholds, or tensors as small as these would be left whole, and all of a step be searched for the
        # next use of each
        thresholds = dict.fromkeys(("stage3_param_persistence_threshold", "stage3_max_reuse_distance"), 0)
        zero: dict[str, Any] = {"stage": int(strategy[4]), **thresholds}
        if strategy.endswith("_offload"):
            zero |= {f"offload_{what}": {"device": "cpu"} for what in ("param", "optimizer")}
        rank = os.environ.get("RANK", "0")  # a file for each process: another may be reading
        config = folder / f"{strategy}.settings.{rank}.json"
        config.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(AUTO, "auto")}))
        os.environ |= {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config), "DS_ACCELERATOR": "cpu"}
        # a faster sum, which would be compiled for minutes
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    return {"use_cpu": False}


def pretend_gpus() -> None:
    """Lets accelerate take the processes for those of GPUs, on the CPU and with gloo."""
    on_cpu = PartialState._prepare_backend

    def prepare_backend(self: PartialState, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        return on_cpu(self, cpu, *args, **kwargs) if cpu else ("gloo", DistributedType.MULTI_GPU)

    PartialState._prepare_backend = prepare_backend
