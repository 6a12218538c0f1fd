"""Modules whose tensors accelerate keeps elsewhere, as a device map asks for."""

import importlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def at_hand(module: nn.Module, device: torch.device | None = None) -> AbstractContextManager[None]:
    """Brings the tensors of a module here (or to a device), of which accelerate keeps none in its place if it offloads
    them."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    # not imported above: a lens that came with its code has to load where accelerate is not installed
    return importlib.import_module("accelerate.utils").align_module_device(module, device)
