"""Each file of examples/accelerate gives the plugin that its name promises, as `accelerate launch` reads it."""

import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
NAMES = ["ddp", "fsdp2", "fsdp2_two_nodes", "zero2", "zero3", "zero3_offload"]


def launched(name, monkeypatch, *flags):
    """The launcher's arguments, and its environment, which is set here as it would be in each process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", *flags, "train_lens.py"]
    )
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if os.environ.get(key) != value:
            monkeypatch.setenv(key, value)
    return arguments


def test_every_file_is_known():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == NAMES


def test_ddp_takes_no_plugin(monkeypatch):
    arguments = launched("ddp", monkeypatch, "--num_processes", "2")
    assert arguments.multi_gpu and arguments.nproc_per_node == "2"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_two_nodes"])
def test_fsdp2(name, monkeypatch):
    nodes = ["--machine_rank", "1", "--main_process_ip", "127.0.0.1"] if name == "fsdp2_two_nodes" else []
    arguments = launched(name, monkeypatch, *nodes)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert plugin.auto_wrap_policy is not None
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    if nodes:
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)


ZERO = [("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "cpu")]


@pytest.mark.parametrize(("name", "stage", "offload"), ZERO, ids=[name for name, *_ in ZERO])
def test_zero(name, stage, offload, monkeypatch):
    pytest.importorskip("deepspeed")
    launched(name, monkeypatch)
    plugin = DeepSpeedPlugin()
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert plugin.zero_stage == stage and not plugin.zero3_init_flag
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == offload
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
