"""Who holds which weights: every process all of them, or, under FSDP2 and ZeRO-3, each process a part of each tensor.

Spread weights are whole only inside the forward pass of the module that was spread, and all processes have to enter
it together. So a lens is only ever used through its own call (`ConsistencyLensModel.forward`), and nothing that one
process alone decides may add or leave out such a call. Subject and LM reference, which are never trained, are spread
likewise, each on its own, as tensors that two such modules share could not be.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..checkpoints import states
from ..lens_artifact import TrainedTensorsModel
from ..lens_decoder import LensDecoder
from ..modeling_consistency_lens import ConsistencyLensModel
from ..residual_stream import ResidualStream
from .lm_reference import freeze_copy


class WholeWeights:
    """Every process holds all weights: one process, DDP, ZeRO-1 and ZeRO-2."""

    spread = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._reference: LensDecoder | None = None
        self.uses_deepspeed = accelerator.distributed_type is DistributedType.DEEPSPEED
        if self.uses_deepspeed and accelerator.mixed_precision == "bf16":
            # its own bfloat16 would round the weights, the statistics and every activation, and the subject's too
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config |= {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

    def prepare(self, lens: ConsistencyLensModel, keep_reference: bool, share_weights: str = "auto") -> None:
        """Settles, before the trainer wraps a lens, how it and the models beside it hold their weights.

        Args:
            lens: with its subject.
            keep_reference: whether `frozen_copy` will be asked for.
            share_weights: see `ShardingArguments`.
        """
        if share_weights == "false":
            give_own_tensors(lens)
        lens.subject.model.to(self.accelerator.device)

    def autocast(self) -> AbstractContextManager:
        """The precision that the lens computes in, while its weights stay as they are."""
        if self.uses_deepspeed and self.accelerator.mixed_precision == "bf16":
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return self.accelerator.autocast()

    def frozen_copy(self, decoder: LensDecoder) -> LensDecoder:
        """The decoder as it is now, not to be trained; every process has to ask for it."""
        return freeze_copy(decoder)

    def gather(self, model: TrainedTensorsModel, keep: bool) -> dict[str, Tensor]:
        """The trained tensors whole, on the CPU, where they are to be kept. Every process has to call it."""
        return {name: tensor.detach().cpu() for name, tensor in model.trained_tensors().items()} if keep else {}

    def fill(self, model: TrainedTensorsModel, whole: Mapping[str, Tensor]) -> None:
        """Lays whole tensors over the trained ones. Every process has to call it, with the same.

        Raises:
            ValueError: if the names or shapes differ from those that the model trains.
        """
        model.load_trained_tensors(dict(whole))

    def save_optimizer(self, optimizer: Any, engine: Any, folder: Path, keep: bool) -> None:
        """Writes the optimizer's state whole, from the process that is to `keep` it; every process has to call it.

        Args:
            optimizer: as the trainer has wrapped it.
            engine: DeepSpeed's; it writes its own files instead, those of each process apart.
            folder: the checkpoint.
            keep: whether this process writes what all have in common.
        """
        if engine is not None:
            engine.save_checkpoint(str(folder))
        elif keep:
            states.save_optimizer(optimizer.state_dict(), folder)

    def load_optimizer(self, optimizer: Any, folder: Path) -> None:
        """Reads what `save_optimizer` wrote; every process has to call it."""
        if not self.uses_deepspeed:  # whose engine has been told already
            optimizer.load_state_dict(states.read_optimizer(optimizer, folder))

    def release(self, lens: ConsistencyLensModel, optimizer: Any) -> None:
        """Gives the memory of the device back after the training; the lens cannot be used any more."""


class SpreadWeights(WholeWeights):
    """What FSDP2 and ZeRO-3 have in common: no tensor belongs to two modules, and copies are made beforehand."""

    spread = True

    def prepare(self, lens: ConsistencyLensModel, keep_reference: bool, share_weights: str = "auto") -> None:
        give_own_tensors(lens)
        # a gradient is divided over the processes when a module's backward pass ends, and sums would come after that
        lens.decoder.sums_gradients = False
        # the hooks have to see the end of every module whose start they saw
        lens.encoder.stops_early = False
        # its check of the model would run the decoder without the hooks of the whole
        lens.decoder.attends_in_place = False
        if keep_reference:
            self._reference = copy.deepcopy(lens.decoder).requires_grad_(False).eval()
            self.spread_frozen(self._reference, self._reference.residual_stream())
        self.spread_frozen(lens.subject.model, lens.subject.stream)
        self.prepare_trained(lens)

    def prepare_trained(self, lens: ConsistencyLensModel) -> None:
        """Settles what the trainer's own wrapping of a lens has to know."""
        raise NotImplementedError

    def spread_frozen(self, model: nn.Module, stream: ResidualStream) -> None:
        """Spreads a model that is not trained, the subject or a reference; `stream` names its blocks."""
        raise NotImplementedError

    def frozen_copy(self, decoder: LensDecoder) -> LensDecoder:
        assert self._reference is not None
        self.copy(decoder, self._reference)
        return self._reference

    def copy(self, source: TrainedTensorsModel, target: TrainedTensorsModel) -> None:
        """Copies trained tensors between models that are spread alike."""
        raise NotImplementedError


class FullyShardedWeights(SpreadWeights):
    """FSDP2: each tensor a `DTensor`, cut along its first dimension; the blocks are gathered one at a time."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.plugin: Any = accelerator.state.fsdp_plugin
        self._lens: ConsistencyLensModel | None = None

    def prepare_trained(self, lens: ConsistencyLensModel) -> None:
        """Names the blocks to cut at, and a precision under which activations keep their own."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self._lens = lens
        lens._no_split_modules = {type(block).__name__ for block in lens.decoder.residual_stream().blocks}
        if self.accelerator.mixed_precision == "bf16":
            # autocast, which is on as well, casts what a layer computes in; inputs and outputs stay as they are
            self.plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def spread_frozen(self, model: nn.Module, stream: ResidualStream) -> None:
        from torch.distributed.fsdp import fully_shard

        settings = {
            "reshard_after_forward": self.plugin.reshard_after_forward,
            "offload_policy": self.plugin.cpu_offload,
        }
        for block in stream.blocks:
            fully_shard(block, **settings)
        fully_shard(model, **settings)

    def own_parts(self, model: TrainedTensorsModel) -> dict[str, Tensor]:
        """The trained tensors as FSDP2 keeps them; after a pass without gradients some are still gathered."""
        from torch.distributed.fsdp import FSDPModule

        # a decoder's embeddings are cut along with the lens that it belongs to
        for module in (*(self._lens or model).modules(), *model.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()
        return model.trained_tensors()

    def gather(self, model: TrainedTensorsModel, keep: bool) -> dict[str, Tensor]:
        return self.put_together(self.own_parts(model), keep)

    def put_together(self, parts: Mapping[str, Any], keep: bool) -> dict[str, Any]:
        """Tensors and other values, the tensors whole and on the CPU; see `gather`."""
        kept = {}
        for name, part in parts.items():  # one at a time: the device never holds two whole ones
            whole = whole_tensor(part, self.accelerator.device) if isinstance(part, Tensor) else part
            if keep:
                kept[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return kept

    def fill(self, model: TrainedTensorsModel, whole: Mapping[str, Tensor]) -> None:
        parts = self.own_parts(model)
        model.load_trained_tensors({name: cut_like(tensor, parts[name]) for name, tensor in whole.items()})

    def save_optimizer(self, optimizer: Any, engine: Any, folder: Path, keep: bool) -> None:
        state = optimizer.state_dict()
        state["state"] = {index: self.put_together(entries, keep) for index, entries in state["state"].items()}
        if keep:
            states.save_optimizer(state, folder)

    def load_optimizer(self, optimizer: Any, folder: Path) -> None:
        saved = states.read_optimizer(optimizer, folder)
        trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        for index, entries in saved["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == trained[index].shape:  # not the count of steps
                    entries[name] = cut_like(value, trained[index])
        optimizer.load_state_dict(saved)

    def release(self, lens: ConsistencyLensModel, optimizer: Any) -> None:
        optimizer.state.clear()
        lens.to(torch.device("cpu"))  # type: ignore[arg-type]

    @torch.no_grad()
    def copy(self, source: TrainedTensorsModel, target: TrainedTensorsModel) -> None:
        parts = self.own_parts(source)
        for name, tensor in self.own_parts(target).items():
            tensor.copy_(parts[name])


class Zero3Weights(SpreadWeights):
    """DeepSpeed ZeRO-3: hooks of every module gather its own tensors before it runs, and release them afterwards."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.engines: list[Any] = []  # keeps the hooks of the frozen models alive
        make_models_whole()

    def prepare_trained(self, lens: ConsistencyLensModel) -> None:
        """Names the tensors that `forward` uses outside the module that holds them."""
        import deepspeed

        for clone in (lens.decoder, lens.encoder):
            for tensor in (clone.token_embedding.weight, clone.prefix_embeddings, clone.suffix_embeddings):
                if tensor is not None:
                    deepspeed.zero.register_external_parameter(lens, tensor)

    def spread_frozen(self, model: nn.Module, stream: ResidualStream) -> None:
        import deepspeed

        config = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        for name in ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "train_batch_size"):
            config.pop(name, None)  # nothing is trained, and the precision is the one that it was loaded in
        config["zero_optimization"].pop("offload_optimizer", None)
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        stream.may_stop = False  # the hooks have to see the end of every module whose start they saw
        engine, *_ = deepspeed.initialize(model=model, config=config)
        self.engines.append(engine)
        model.eval()

    def gather(self, model: TrainedTensorsModel, keep: bool) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in model.trained_tensors().items():
            with gathered_parameter(tensor):
                if keep:
                    kept[name] = tensor.detach().cpu().clone()
        return kept

    @torch.no_grad()
    def fill(self, model: TrainedTensorsModel, whole: Mapping[str, Tensor]) -> None:
        for name, tensor in model.trained_tensors().items():
            with gathered_parameter(tensor, written=True):
                tensor.copy_(whole[name])

    @torch.no_grad()
    def copy(self, source: TrainedTensorsModel, target: TrainedTensorsModel) -> None:
        tensors = source.trained_tensors()
        for name, tensor in target.trained_tensors().items():
            with gathered_parameter(tensors[name]), gathered_parameter(tensor, written=True):
                tensor.copy_(tensors[name])


def weights_of(accelerator: Accelerator) -> WholeWeights:
    """How the processes of a run hold the weights."""
    if accelerator.distributed_type is DistributedType.FSDP:
        return FullyShardedWeights(accelerator)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return Zero3Weights(accelerator) if accelerator.deepspeed_plugin.zero_stage == 3 else WholeWeights(accelerator)
    return WholeWeights(accelerator)


def make_models_whole() -> None:
    """Has `transformers` make and load models whole, though it may have been told of ZeRO-3.

    It would spread them at once then; but a subject is read, and a lens made of it, before there is any training.
    """
    unset_hf_deepspeed_config()


def give_own_tensors(lens: ConsistencyLensModel) -> None:
    """Copies the frozen tensors that a clone has in common with the subject, or with the other clone.

    It is done on the CPU: no device may have room for the copies before they are spread.
    """
    lens.to(torch.device("cpu"))  # type: ignore[arg-type]  # takes the subject along
    taken = {id(tensor) for tensor in lens.subject.model.parameters()}
    for clone in (lens.decoder, lens.encoder):
        if any(id(tensor) in taken for tensor in clone.base.parameters()):
            clone.base = copy.deepcopy(clone.base)
        taken |= {id(tensor) for tensor in clone.base.parameters()}


def whole_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor, or all parts of a `DTensor` put together; all processes have to ask for it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor.detach()
    part: Any = tensor.detach().to(device)
    return part.full_tensor()


def cut_like(whole: Tensor, part: Tensor) -> Tensor:
    """A whole tensor, cut as `part` is; all processes have to ask for it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(part, DTensor):
        return whole
    mesh = part.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, part.placements).to(part.device)


def gathered_parameter(tensor: Tensor, written: bool = False) -> AbstractContextManager:
    """Inside, a parameter of ZeRO-3 is whole; what the main process has `written` to it is then everyone's."""
    import deepspeed

    parameters = [tensor] if isinstance(tensor, nn.Parameter) else []
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if written else None)
