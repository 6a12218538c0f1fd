"""The readout of a causal language model in float32: its final norm, its unembedding, and what it does to the logits.

Shapes: S tokens, d width, V vocabulary; leading dimensions are free.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..offloaded import at_hand
from ..residual_stream import ResidualStream, leaves_stream

# config fields by which architectures multiply (Cohere) or divide (Granite) their logits
FACTORS = {"logit_scale": 1, "logits_scaling": -1}
CHECK_TOKENS = 8
# of the largest logit: what the readout in float32 may differ from the model's own logits
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Readout:
    """From the last residual to next-token logits, as the model itself goes, in float32.

    The weights are copies in float32 where the model holds others; the model is left as it is.

    Args:
        model: a causal language model.
        blocks, final_norm: see `ResidualStream`.

    Attributes:
        width: d, what the blocks write and translators before the norm work on.
        weight: W (V, d'), float32; d' = d but where the head first projects to narrower embeddings (OPT-350M).
            A factor by which the architecture multiplies its logits is in it, and in the bias.
        bias: (V,) or None.
        soft_cap: c of `c tanh(logits / c)` (Gemma 2), or None.

    Raises:
        ValueError: if the model has no head, or the head does more than is known here.
    """

    def __init__(self, model: PreTrainedModel, blocks: str | None = None, final_norm: str | None = None) -> None:
        stream = ResidualStream(model, blocks=blocks, final_norm=final_norm)
        if stream.unembedding is None:
            raise ValueError(
                f"model: {type(model).__name__} has no unembedding, so nothing can be decoded; load it as a causal "
                "language model with its head"
            )
        config = model.config.get_text_config()
        fields = config.to_dict()
        self.width = stream.width
        self.soft_cap: float | None = fields.get("final_logit_softcapping")
        factor = 1.0
        for name, power in FACTORS.items():
            factor *= (fields.get(name) or 1.0) ** power
        self._norm = stream.final_norm
        self._norm_tensors = {} if self._norm is None else _float_tensors(self._norm)
        projections = [child for child in stream.siblings() if leaves_stream(child, stream.width)]
        self._projection: nn.Module | None = projections[0] if projections else None
        self._projection_tensors = {} if self._projection is None else _float_tensors(self._projection)
        head = _float_tensors(stream.unembedding)
        if factor != 1:
            head = {name: tensor * factor for name, tensor in head.items()}
        self.weight = head["weight"]
        self.bias = head.get("bias")
        if self.weight.ndim != 2:
            raise ValueError(f"model: the unembedding of {type(model).__name__} is quantised; load it unquantised")
        self._check(model, stream)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the readout computes."""
        return self.weight.device

    def normalise(self, residual: Tensor) -> Tensor:
        """The residual after the final norm, (..., d) to (..., d') float32, on the readout's device.

        Where an architecture has no final norm, its blocks leave the stream normalised, and this changes nothing.
        """
        hidden = residual.to(self.device, torch.float32)
        if self._norm is not None:
            hidden = functional_call(self._norm, self._norm_tensors, (hidden,))
        if self._projection is not None:
            hidden = functional_call(self._projection, self._projection_tensors, (hidden,))
        return hidden

    def logits(self, normalised: Tensor) -> Tensor:
        """Logits (..., V) float32 of normalised residuals (..., d')."""
        return self.capped(nn.functional.linear(normalised, self.weight, self.bias))

    def capped(self, logits: Tensor) -> Tensor:
        """What the model does to the logits after its unembedding."""
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel, stream: ResidualStream) -> None:
        """Reads a few tokens both ways: what the head does beyond this class would show."""
        device = stream.input_embedding.get_parameter("weight").device
        device = torch.device("cpu") if device.type == "meta" else device
        ids = torch.arange(CHECK_TOKENS, device=device)[None] % self.vocab_size
        with stream.capture(stream.num_layers - 1) as captured:
            expected = model(input_ids=ids, use_cache=False).logits.float()
        found = self.logits(self.normalise(captured.activations)).to(expected.device)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE.get(model.dtype, TOLERANCE[torch.float32]):
            raise ValueError(
                f"model: the head of {type(model).__name__} does more than norm, unembedding, bias, factor and "
                f"soft-cap (its logits differ by {difference:.2g} of the largest); this architecture is not supported"
            )


def check_head(name: str, model: PreTrainedModel) -> None:
    """Raises a ValueError for a subject that was saved without its head, which loading then draws at random."""
    config = model.config
    tied = config.get_text_config().tie_word_embeddings
    if not tied and type(model.base_model).__name__ in (config.architectures or []):
        raise ValueError(
            f"model: {name!r} was saved without its head, as {type(model.base_model).__name__}; pass a causal "
            "language model with it"
        )


def _float_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers in float32; those that are float32 already are not copied."""
    with at_hand(module):
        tensors: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {
            name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            for name, tensor in tensors.items()
        }
