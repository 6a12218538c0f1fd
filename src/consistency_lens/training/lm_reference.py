"""What the decoder's text is held close to: the subject as it is, or the decoder as warm start left it."""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..evaluation.metrics import start_token
from ..lens_decoder import LensDecoder
from ..quantised import state_beside_weights
from ..subject import Subject
from ..token_logits import TokenLogits


class Reference(Protocol):
    """Activations (B, d) and text ids (B, T) in, the reference's logits for each of the B * T tokens out.

    With a `chunk_size` it keeps its hidden states, and makes logits of the rows that it is asked for.
    """

    def __call__(self, activations: Tensor, ids: Tensor, chunk_size: int = 0) -> TokenLogits: ...


@dataclass
class SubjectReference:
    """The subject as LM reference: it reads the text after BOS (or EOS, if it has no BOS), and no activation."""

    subject: Subject

    def __call__(self, activations: Tensor, ids: Tensor, chunk_size: int = 0) -> TokenLogits:
        start = torch.full_like(ids[:, :1], start_token(self.subject.model.config.get_text_config()))
        states = self.subject.run(chunk_size == 0, input_ids=torch.cat([start, ids[:, :-1]], dim=1), use_cache=False)
        return TokenLogits.of(states, self.subject.head, chunk_size)


@dataclass
class DecoderReference:
    """A decoder that is not trained as LM reference: it reads the activation, and the text before each token."""

    decoder: LensDecoder

    def __call__(self, activations: Tensor, ids: Tensor, chunk_size: int = 0) -> TokenLogits:
        return self.decoder.score(activations, ids, chunk_size).predictions


def freeze_copy(decoder: LensDecoder) -> LensDecoder:
    """A frozen copy of a decoder: trained tensors copied, frozen ones shared."""
    memo: dict[int, Any] = {id(item): item for item in state_beside_weights(decoder.base)}
    # not by `requires_grad`, which a group that is yet to be unfrozen lacks
    trained = {id(tensor) for tensor in decoder.trained_tensors().values()}
    memo |= {id(t): t for t in decoder.parameters() if id(t) not in trained}
    return copy.deepcopy(decoder, memo).requires_grad_(False).eval()
