"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) of the clones.

PEFT runs a layer with its adapter as five operations and differentiates them by seven: the layer's product, two of the
adapter, a factor, a sum. A text is passes of one token, so these operations are small, and a step starts tens of
thousands of them; on GPUs each takes some microseconds, however small it is. `adapters_at_once` makes one node of a
layer and its adapter, of three operations forward and five backward.
Shapes: n rows, d width of the input, m of the output, r rank.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from .optional_packages import require
from .plain_arithmetic import is_plain
from .rounded_weights import (
    RoundedWeights,
    computed_dtype,
    forwards_replaced,
    is_changed,
    is_frozen_linear,
    is_whole,
    runs_otherwise,
)
from .summed_gradient import SummedGradient

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
    others_under_autocast = len(once) < len(adapters) and torch.is_autocast_enabled(device)
    with as_they_are(lens, active=others_under_autocast), forwards_replaced(once, LayerWithAdapter):
        yield


def as_they_are(lens: nn.Module, active: bool) -> AbstractContextManager[None]:
    """Leaves the inputs of adapters to autocast."""
    if not active:
        return nullcontext()
    return require("peft.helpers", extra="lora", needed_for=NEEDED_FOR).disable_input_dtype_casting(lens)


def layers_at_once(lens: nn.Module, adapters: list[Any]) -> list[Any]:
    """Those that run as one node."""
    if runs_otherwise(lens):
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
    """Whether a layer is a frozen linear one, and has an adapter that is nothing but two matrices."""
    base, down, up = parts = (layer.base_layer, layer.lora_A[NAME], layer.lora_B[NAME])
    variants = (getattr(layer, "lora_variant", {}), getattr(layer, "use_dora", {}))
    return (
        is_frozen_linear(base)
        and type(down) is type(up) is nn.Linear
        and is_whole(down.weight)
        and is_whole(up.weight)
        and down.bias is up.bias is None
        and not any(is_changed(module) for module in (layer, *parts))
        and layer.active_adapters == [NAME]
        and not (layer.merged or layer.disable_adapters or any(variant.get(NAME) for variant in variants))
        and (isinstance(layer.lora_dropout[NAME], nn.Identity) or not layer.training)
        and computes_alike([part.weight for part in parts])
    )


def computes_alike(weights: list[Tensor]) -> bool:
    """Whether all of a layer is computed in one dtype."""
    if torch.is_autocast_enabled(weights[0].device.type):
        return all(weight.dtype in (torch.float32, torch.bfloat16, torch.float16) for weight in weights)
    return len({weight.dtype for weight in weights}) == 1


class LayerWithAdapter:
    """W x + b + s B A x, for one step: inputs (..., d) to outputs (..., m)."""

    def __init__(self, layer: Any, rounded: RoundedWeights) -> None:
        self.layer, self.rounded = layer, rounded
        # of a dtype, and with gradients or without: the matrices as all passes use them
        self.matrices: dict[tuple[torch.dtype, bool], Matrices] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        key = (computed_dtype(inputs), torch.is_grad_enabled())
        if key not in self.matrices:
            self.matrices[key] = self.matrices_in(key[0])
        matrices = self.matrices[key]
        return _AtOnce.apply(inputs, matrices, matrices.down.anchor, matrices.up.anchor)

    def matrices_in(self, dtype: torch.dtype) -> "Matrices":
        """What passes in a dtype multiply with."""
        base, down, up = self.layer.base_layer, self.layer.lora_A[NAME].weight, self.layer.lora_B[NAME].weight
        scaled = up * self.layer.scaling[NAME]
        # nothing waits: what a product with so few columns saves is less than the gradients would take
        sums = (SummedGradient(matrix.to(dtype), rows_at_once=0) for matrix in (down, scaled))
        return Matrices(self.rounded.matrix(base, dtype), self.rounded.bias(base, dtype), *sums)


class Matrices(NamedTuple):
    """W and b, A and s B; all uses of an adapter add to one gradient."""

    weight: Tensor
    bias: Tensor | None
    down: SummedGradient
    up: SummedGradient


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrices: Matrices, _of_down: Tensor, _of_up: Tensor) -> Tensor:
        weight, bias, down, up = matrices.weight, matrices.bias, matrices.down.weight, matrices.up.weight
        rows = inputs.to(weight.dtype).flatten(0, -2)
        inner = rows @ down.T
        outputs = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        torch.addmm(outputs, inner, up.T, out=outputs)
        ctx.save_for_backward(rows, inner)
        ctx.matrices, ctx.input_dtype = matrices, inputs.dtype
        return outputs.unflatten(0, inputs.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        rows, inner = ctx.saved_tensors
        weight, _, down, up = ctx.matrices
        shape, grad = grad.shape[:-1], grad.flatten(0, -2)
        of_inner, of_inputs = grad @ up.weight, None
        if ctx.needs_input_grad[0]:
            of_rows = grad @ weight
            torch.addmm(of_rows, of_inner, down.weight, out=of_rows)
            of_inputs = of_rows.to(ctx.input_dtype).unflatten(0, shape)
        if ctx.needs_input_grad[2]:
            down.add_product(of_inner, rows)
        if ctx.needs_input_grad[3]:
            up.add_product(grad, inner)
        return of_inputs, None, None, None
