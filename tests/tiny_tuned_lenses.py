"""Tiny tuned lenses over the subjects of `tiny_models`."""

from typing import Any

import torch
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens


def tiny_tuned_lens(family: str = "llama", seed: int = 1, **model: Any) -> TunedLens:
    """A lens whose translators are not the identity, and whose norm lens is calibrated."""
    lens = TunedLens.for_model(tiny_model(family, **model), tiny_tokenizer())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.translators.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        lens.norm_temperature[:-1] += 0.5
    return lens
