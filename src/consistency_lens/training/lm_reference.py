"""What the decoder's text is held close to: the subject as it is, or the decoder as warm start left it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.metrics import start_token
from ..lens_decoder import LensDecoder
from ..quantised import state_beside_weights
from ..subject import Subject

# (activations (B, d), text ids (B, T)) -> the reference's logits (B, T, V) for each token of the text
Reference = Callable[[Tensor, Tensor], Tensor]


@dataclass
class SubjectReference:
    """The subject as LM reference: it reads the text after BOS (or EOS, if it has no BOS), and no activation."""

    subject: Subject

    def __call__(self, activations: Tensor, ids: Tensor) -> Tensor:
        start = torch.full_like(ids[:, :1], start_token(self.subject.model.config.get_text_config()))
        return self.subject.model(input_ids=torch.cat([start, ids[:, :-1]], dim=1), use_cache=False).logits


def freeze_copy(decoder: LensDecoder) -> LensDecoder:
    """A frozen copy of a decoder: trained tensors copied, frozen ones shared."""
    memo: dict[int, Any] = {id(item): item for item in state_beside_weights(decoder.base)}
    # not by `requires_grad`, which a group that is yet to be unfrozen lacks
    trained = {id(tensor) for tensor in decoder.trained_tensors().values()}
    memo |= {id(t): t for t in decoder.parameters() if id(t) not in trained}
    return copy.deepcopy(decoder, memo).requires_grad_(False).eval()
