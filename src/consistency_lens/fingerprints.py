"""Hashes that say which subject and which tokenizer data was made with."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .offloaded import at_hand


def weights_hash(model: PreTrainedModel) -> str:
    """Sha256 over names, dtypes, shapes and bytes of a model's parameters as loaded, in the order of their names.

    Of quantised weights their scales count too, which are no parameters.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        if parameter.is_meta:
            # Offloaded by its device map: accelerate brings the values when they are asked for.
            module, _, own_name = name.rpartition(".")
            with at_hand(model.get_submodule(module), torch.device("cpu")):
                _update(digest, model.get_submodule(module).get_parameter(own_name))
        else:
            _update(digest, parameter)
    for name, scale in sorted(_scales(model).items()):
        digest.update(f"{name} {scale.dtype} {tuple(scale.shape)}".encode())
        _update(digest, scale)
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 over a tokenizer's vocabulary and special tokens."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, default=str).encode()).hexdigest()


def _scales(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model saves that is neither parameter nor buffer: the scales of quantised weights; else nothing."""
    known = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    return {name: value for name, value in model.state_dict().items() if name not in known}


def _update(digest: Any, values: Tensor) -> None:
    digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
