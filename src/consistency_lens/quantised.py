"""Subjects whose weights bitsandbytes has quantised: what clones of them share, and what keeps their gradients."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from .optional_packages import require

# What transformers leaves on a model that it has quantised, and PEFT looks for.
MARKS = ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_8bit", "is_loaded_in_4bit")


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether transformers has quantised the model."""
    return "is_quantized" in vars(model)


def copy_marks(model: PreTrainedModel, inner: PreTrainedModel) -> None:
    """Marks a part of a quantised model as quantised, too."""
    for name in MARKS:
        if name in vars(model):
            setattr(inner, name, getattr(model, name))


def state_beside_weights(model: PreTrainedModel) -> Iterator[Any]:
    """The scales of quantised weights, which are neither parameters nor buffers; nothing for any other model.

    8-bit layers hold them at the weight until their first pass and then move them to the layer: with a weight that
    several layers share, the first to run would take them from the others, which then quantise the quantised weight
    once more, in silence. They are moved here.
    """
    if not is_quantised(model):
        return
    layers = require("bitsandbytes", extra="quant", needed_for="a quantised subject").nn
    for module in model.modules():
        if isinstance(module, layers.Linear8bitLt):
            if module.weight.CB is not None:
                module.init_8bit_state()
            yield from (module.state.CB, module.state.SCB)
        elif isinstance(module, layers.Linear4bit):
            yield module.weight.quant_state


def keep_gradients(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16 in their first pass, in place: what
    comes through repacked weights has no gradient, and says so in a warning alone."""
    if not is_quantised(model):
        return
    linear_4bit = require("bitsandbytes", extra="quant", needed_for="a quantised subject").nn.Linear4bit
    for module in model.modules():
        if isinstance(module, linear_4bit):
            module.support_avx512bf16_for_cpu = False
