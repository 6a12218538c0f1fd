"""How the processes of a run may hold its weights: the setting, and what cannot be asked for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers import TrainingArguments

SHARE_WEIGHTS = ("auto", "true", "false")


@dataclass(repr=False)  # that of `TrainingArguments` has no token in it
class ShardingArguments:
    """How the frozen weights of subject and clones are held."""

    share_weights: str = field(
        default="auto",
        metadata={
            "help": "Frozen weights that subject and clones have in common: true holds them once, false once each; "
            "auto: once, but under FSDP2 and ZeRO-3, which cannot.",
            "choices": SHARE_WEIGHTS,
        },
    )


def spread_by(args: TrainingArguments) -> str | None:
    """What spreads the weights of a run over its processes, "FSDP" or "ZeRO-3"; None if nothing does."""
    if args.distributed_state is None or args.distributed_state.distributed_type is DistributedType.MULTI_CPU:
        return None  # accelerate leaves both out on a CPU
    plugin: Any = args.deepspeed_plugin
    if plugin is not None:
        return "ZeRO-3" if plugin.zero_stage == 3 else None
    return "FSDP" if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def check_sharding(args: TrainingArguments, share_weights: str) -> None:
    """Checks how the weights of a run are to be held, before anything is loaded.

    Raises:
        ValueError: for settings that a lens cannot be trained with.
    """
    if share_weights not in SHARE_WEIGHTS:
        raise ValueError(f"share_weights must be one of {', '.join(SHARE_WEIGHTS)}, got {share_weights!r}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > args.world_size:
        raise ValueError(
            f"use_cpu: {launched} processes were launched, but no GPU was found, and each would train by itself; set "
            "it to true"
        )
    strategy = spread_by(args)
    if strategy is not None and share_weights == "true":
        raise ValueError(
            f"share_weights: {strategy} spreads each model's tensors by itself, so that subject and clones cannot "
            "have any in common; set it to auto, or launch with DDP or ZeRO-2"
        )
    if args.fp16 and args.deepspeed_plugin is not None:
        raise ValueError("fp16: DeepSpeed would keep statistics and activations in float16 as well; use bf16")
    if strategy == "FSDP":
        check_fsdp(args.fsdp_plugin_args)


def check_fsdp(arguments: Mapping[str, Any] | None) -> None:
    """Checks the settings of FSDP: those in the training arguments, or those that `accelerate launch` has set.

    Raises:
        ValueError: for one that a lens cannot be trained with.
    """
    plugin = FullyShardedDataParallelPlugin(**(arguments or {}))
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: got {plugin.fsdp_version}, a lens is trained with 2; set fsdp_version: 2")
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing drops the cache of a text that is generated; set it to false and "
            "gradient_checkpointing to true"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: every process reads the subject, so it has to be loaded by all; set it "
            "to false"
        )
