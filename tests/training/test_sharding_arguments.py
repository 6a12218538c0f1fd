from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from lens_runs import tiny_cache, tiny_lens, tiny_trainer

from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.sharding import give_own_tensors
from consistency_lens.training.sharding_arguments import check_sharding, spread_by

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ON_GPUS = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, num_processes=1)


def arguments(tmp_path, **settings):
    return ConsistencyLensTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        (
            FSDP,
            {"share_weights": "true"},
            "share_weights: FSDP spreads each model's tensors .* set it to auto",
        ),
        (FSDP | {"FSDP_VERSION": "1"}, {}, "fsdp_version: got 1, a lens is trained with 2; set fsdp_version: 2"),
        (
            FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "fsdp_activation_checkpointing drops the cache .* false",
        ),
        (
            FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {},
            "fsdp_cpu_ram_efficient_loading: every process .* false",
        ),
        ({}, {"share_weights": "once"}, "share_weights must be one of auto, true, false, got 'once'"),
        ({"WORLD_SIZE": "2"}, {}, "use_cpu: 2 processes were launched, but no GPU was found, .*; set it to true"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, monkeypatch, environment, settings, message):
    args = arguments(tmp_path, **settings)
    args.distributed_state = ON_GPUS  # a stand-in: these processes have none
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_sharding(args, args.share_weights)


@pytest.mark.parametrize(("stage", "expected"), [(2, None), (3, "ZeRO-3")])
def test_zero_3_spreads_weights(tmp_path, stage, expected):
    args = arguments(tmp_path)
    args.distributed_state = ON_GPUS
    args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    assert spread_by(args) == expected


def test_zero_3_cannot_share(tmp_path):
    args = arguments(tmp_path, share_weights="true")
    args.distributed_state = ON_GPUS
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="share_weights: ZeRO-3 spreads each model's tensors by itself"):
        check_sharding(args, args.share_weights)


def test_nothing_is_spread_on_a_cpu(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert spread_by(args) is None


def test_the_precision_of_the_launcher_is_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments(tmp_path).bf16


def tensors(*models):
    return [{id(parameter) for parameter in model.parameters()} for model in models]


def test_own_tensors_are_equal_ones(tmp_path):
    lens = tiny_lens(*tiny_cache(tmp_path), training="frozen")
    before = {name: tensor.clone() for name, tensor in lens.state_dict().items()}
    subject, decoder, encoder = tensors(lens.subject.model, lens.decoder.base, lens.encoder.base)
    assert subject & decoder & encoder
    give_own_tensors(lens)
    subject, decoder, encoder = tensors(lens.subject.model, lens.decoder.base, lens.encoder.base)
    assert not subject & decoder and not subject & encoder and not decoder & encoder
    assert all(torch.equal(tensor, before[name]) for name, tensor in lens.state_dict().items())
    assert not any(parameter.requires_grad for parameter in lens.decoder.base.parameters())


@pytest.mark.parametrize(("share", "shares"), [("auto", True), ("true", True), ("false", False)])
def test_the_trainer_shares_what_it_may(tmp_path, share, shares):
    trainer = tiny_trainer(tmp_path, {"training": "frozen"}, share_weights=share)
    subject, decoder = tensors(trainer.lens.subject.model, trainer.lens.decoder.base)
    assert bool(subject & decoder) == shares
