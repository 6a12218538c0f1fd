"""Makes FSDP2 and DeepSpeed spread weights over processes on a CPU, where accelerate would run plain DDP instead."""

import importlib
import os

from accelerate import PartialState
from accelerate.utils import DistributedType

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
STRATEGIES: dict[str, dict[str, str]] = {"ddp": {}, "fsdp2": FSDP2, "zero2": ZERO2, "zero3": ZERO3}


def use(strategy: str) -> None:
    """Sets what `accelerate launch` would for a strategy; before any training arguments are made."""
    for names in STRATEGIES.values():
        for name in names:
            os.environ.pop(name, None)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", **STRATEGIES[strategy]}
    PartialState._prepare_backend = lambda *_args, **_kwargs: ("gloo", DistributedType.MULTI_GPU)
    if "ACCELERATE_USE_DEEPSPEED" in STRATEGIES[strategy]:
        # a faster sum, which would be compiled for minutes
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
