"""Frozen float32 weights under autocast, rounded once a step.

Autocast keeps its copy of a weight that is trained, but rounds a frozen one for every use, and the backward pass keeps
each of these copies: a text of T tokens, of which each is a pass, would hold every weight T times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .cached_passes import checkpointed_modules
from .plain_arithmetic import is_plain


class RoundedWeights:
    """Copies of frozen weights, each made once, however many layers and clones share it."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Tensor, torch.dtype], Tensor] = {}

    def matrix(self, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """The weight of a linear layer as (outputs, inputs)."""
        weight = self._copy(layer.get_parameter("weight"), dtype)
        return weight.T if isinstance(layer, Conv1D) else weight

    def bias(self, layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
        """Its bias (outputs,), if it has one."""
        return None if layer.bias is None else self._copy(layer.get_parameter("bias"), dtype)

    def _copy(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        if (weight, dtype) not in self._copies:
            self._copies[weight, dtype] = weight.detach().to(dtype)
        return self._copies[weight, dtype]


@contextmanager
def weights_rounded_once(lens: nn.Module) -> Iterator[None]:
    """Has the frozen linear layers of a lens use one rounded copy of their weights, where autocast is on and
    `plain_arithmetic` off.

    Layers that are compiled, that run again in the backward pass, or that `is_frozen_linear` does not know stay as
    they are.
    """
    layers = [] if is_plain() or runs_otherwise(lens) else [m for m in lens.modules() if rounds_at_each_use(m)]
    with forwards_replaced(layers, FrozenLayer):
        yield


@contextmanager
def forwards_replaced(layers: list[Any], kind: Callable[[Any, RoundedWeights], Any]) -> Iterator[None]:
    """Has layers run as those of another kind, which share their rounded weights."""
    rounded = RoundedWeights()
    for layer in layers:
        layer.forward = kind(layer, rounded)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class FrozenLayer:
    """A linear layer under autocast: inputs (..., d) to outputs (..., m)."""

    def __init__(self, layer: nn.Module, rounded: RoundedWeights) -> None:
        self.layer, self.rounded = layer, rounded

    def __call__(self, inputs: Tensor) -> Tensor:
        dtype = computed_dtype(inputs)
        weight, bias = self.rounded.matrix(self.layer, dtype), self.rounded.bias(self.layer, dtype)
        return nn.functional.linear(inputs, weight, bias)


def computed_dtype(inputs: Tensor) -> torch.dtype:
    """What a product with these inputs is computed in."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def runs_otherwise(lens: nn.Module) -> bool:
    """Whether a part of a lens is compiled, or will run again in the backward pass."""
    compiled = any(module._compiled_call_impl is not None for module in lens.modules())
    return compiled or (lens.training and len(checkpointed_modules(lens)) > 0)


def rounds_at_each_use(layer: Any) -> bool:
    """Whether autocast rounds the weight of a layer, and keeps no copy of it."""
    if not is_frozen_linear(layer) or is_changed(layer):
        return False
    return layer.weight.dtype == torch.float32 and torch.is_autocast_enabled(layer.weight.device.type)


def is_frozen_linear(layer: Any) -> bool:
    """Whether a layer is an ordinary linear one, of which nothing is trained."""
    return (
        type(layer) in (nn.Linear, Conv1D)
        and is_whole(layer.weight)
        and not any(parameter.requires_grad for parameter in layer.parameters())
    )


def is_whole(weight: Tensor) -> bool:
    """Whether a weight lies on this device whole: no DTensor, and none of ZeRO-3's, which are empty meanwhile."""
    return type(weight) is nn.Parameter and weight.ndim == 2 and weight.numel() > 0 and not hasattr(weight, "ds_id")


def is_changed(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)
