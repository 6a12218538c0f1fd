"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) of the clones.

PEFT runs a layer with its adapter as five operations and differentiates them by nine: the layer's product, two of the
adapter, a factor, a sum. A text is passes of one token, so these operations are small, and a step starts tens of
thousands of them; on GPUs each takes some microseconds, however small it is. `adapters_at_once` makes one node of a
layer and its adapter, of three operations forward and five backward. Under autocast, weights in float32 are rounded
once a step: autocast itself rounds a frozen one for every use, and each copy is kept for the backward pass.
Shapes: n rows, d width of the input, m of the output, r rank.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .cached_passes import checkpointed_modules
from .optional_packages import require
from .plain_arithmetic import is_plain

NAME = "lens"
NEEDED_FOR = "training='lora'"


def add_adapter(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Adds an adapter to `model`, in place; all else in it is frozen.

    Raises:
        ValueError: if PEFT is missing or refuses the settings, or if they would train more than low-rank matrices of
            blocks and head: the clone's own tensors are shared with the subject, which must not move.
    """
    peft = require("peft", extra="lora", needed_for=NEEDED_FOR)
    # A router gives a tuple, which an adapter cannot add to (Llama 4, Phi-3.5-MoE); to PEFT it is a linear layer.
    routers = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and type(m).__name__.endswith("Router")
    ]
    if routers:
        lora = {"exclude_modules": routers} | lora
    try:
        with warnings.catch_warnings():
            # of settings that PEFT makes up and mends by itself: for GPT-2's layers, and for experts in one tensor
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set|The following (rank|alpha)_pattern")
            peft.inject_adapter_in_model(peft.LoraConfig(**lora), model, adapter_name=NAME)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: PEFT refuses {lora}: {error}") from error
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Embeddings are read by table row on the soft path, past any adapter of the layer.
    outside = [name for name in trained if ".lora_" not in name or ".lora_embedding_" in name]
    if outside:
        raise ValueError(
            f"lora: these settings train {outside[0]}, which is no low-rank matrix of a block; leave out `bias`, "
            "`modules_to_save` and embeddings, or use training='full'"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bfloat16, an optimizer's small updates would be rounded away
            parameter.data = parameter.data.float()


@contextmanager
def adapters_at_once(lens: nn.Module) -> Iterator[None]:
    """Has each layer with an adapter run both as one node, where it can and `plain_arithmetic` is off.

    What has run in it may be differentiated afterwards, but not run again: where there are checkpoints, PEFT's way
    stays. So it does for layers that are compiled, that somebody has changed or put hooks on, whose weights are
    quantised or spread over devices, or whose adapter has dropout, a bias or a variant. Under autocast, these are left
    their inputs as they are: PEFT would widen each to the dtype of the adapter, and autocast round it back.
    """
    adapters: list[Any] = [module for module in lens.modules() if NAME in getattr(module, "lora_A", ())]
    if not adapters or is_plain():
        yield
        return
    once = layers_at_once(lens, adapters)
    device = adapters[0].lora_A[NAME].weight.device.type
    with as_they_are(lens, active=len(once) < len(adapters) and torch.is_autocast_enabled(device)):
        rounded: Rounded = {}
        for layer in once:
            layer.forward = LayerWithAdapter(layer, rounded)
        try:
            yield
        finally:
            for layer in once:
                del layer.forward


def as_they_are(lens: nn.Module, active: bool) -> AbstractContextManager[None]:
    """Leaves the inputs of adapters to autocast."""
    if not active:
        return nullcontext()
    return require("peft.helpers", extra="lora", needed_for=NEEDED_FOR).disable_input_dtype_casting(lens)


def layers_at_once(lens: nn.Module, adapters: list[Any]) -> list[Any]:
    """Those that run as one node."""
    compiled = any(module._compiled_call_impl is not None for module in lens.modules())
    if compiled or (lens.training and checkpointed_modules(lens)):
        return []
    kind = require("peft.tuners.lora", extra="lora", needed_for=NEEDED_FOR).Linear
    # a head may run again, to make its logits chunk by chunk
    heads = [module.get_output_embeddings() for module in lens.modules() if isinstance(module, PreTrainedModel)]
    return [
        layer
        for layer in adapters
        if type(layer) is kind and is_ordinary(layer) and not any(layer is head for head in heads)
    ]


def is_ordinary(layer: Any) -> bool:
    """Whether a layer is a linear one with frozen weights, and has an adapter that is nothing but two matrices."""
    base, down, up = parts = (layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME])
    variants = (getattr(layer, "lora_variant", {}), getattr(layer, "use_dora", {}))
    return (
        type(base) in (nn.Linear, Conv1D)
        and type(down) is type(up) is nn.Linear
        and all(is_whole(part.weight) for part in parts)
        and not any(is_changed(module) for module in (layer, *parts))
        and down.bias is up.bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
        and layer.active_adapters == [NAME]
        and not (layer.merged or layer.disable_adapters or any(variant.get(NAME) for variant in variants))
        and (isinstance(layer.lora_dropout[NAME], nn.Identity) or not layer.training)
        and computes_alike([part.weight for part in parts])
    )


def is_whole(weight: Tensor) -> bool:
    """Whether a weight lies on this device whole: no DTensor, and none of ZeRO-3's, which are empty meanwhile."""
    return type(weight) is nn.Parameter and weight.ndim == 2 and weight.numel() > 0 and not hasattr(weight, "ds_id")


def is_changed(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


def computes_alike(weights: list[Tensor]) -> bool:
    """Whether all of a layer is computed in one dtype."""
    if torch.is_autocast_enabled(weights[0].device.type):
        return all(weight.dtype in (torch.float32, torch.bfloat16, torch.float16) for weight in weights)
    return len({weight.dtype for weight in weights}) == 1


# Frozen matrices of a step in the dtype that is computed in, once for all layers and clones that share them.
Rounded = dict[tuple[nn.Parameter, torch.dtype], Tensor]


class LayerWithAdapter:
    """W x + b + s B A x, for one step: inputs (..., d) to outputs (..., m)."""

    def __init__(self, layer: Any, rounded: Rounded) -> None:
        self.layer, self.rounded = layer, rounded
        # of a dtype, and with gradients or without: the matrices as all passes use them
        self.matrices: dict[tuple[torch.dtype, bool], tuple[Tensor | None, ...]] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        key = (dtype, torch.is_grad_enabled())
        if key not in self.matrices:
            self.matrices[key] = self.matrices_in(dtype)
        return _AtOnce.apply(inputs, *self.matrices[key])

    def matrices_in(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """W, b, A and s B."""
        base, down, up = self.layer.base_layer, self.layer.lora_A[NAME].weight, self.layer.lora_B[NAME].weight
        if (base.weight, dtype) not in self.rounded:
            self.rounded[base.weight, dtype] = base.weight.detach().to(dtype)
        weight = self.rounded[base.weight, dtype]
        weight = weight.T if isinstance(base, Conv1D) else weight
        bias = None if base.bias is None else base.bias.to(dtype)
        return weight, bias, down.to(dtype), (up * self.layer.scaling[NAME]).to(dtype)


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        rows = inputs.to(weight.dtype).flatten(0, -2)
        inner = rows @ down.T
        outputs = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        torch.addmm(outputs, inner, up.T, out=outputs)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.input_dtype = inputs.dtype
        return outputs.unflatten(0, inputs.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, down, up = ctx.saved_tensors
        shape, grad = grad.shape[:-1], grad.flatten(0, -2)
        of_inner, of_inputs = grad @ up, None
        if ctx.needs_input_grad[0]:
            of_rows = grad @ weight
            of_inputs = torch.addmm(of_rows, of_inner, down, out=of_rows).to(ctx.input_dtype).unflatten(0, shape)
        return of_inputs, None, None, of_inner.T @ rows, grad.T @ inner
