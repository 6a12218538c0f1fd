"""What an objective reads of the decoder's logits: a few numbers for each token, whichever way the logits are held."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import entropy, k3_divergence, kl_divergence, token_log_probabilities
from ..spans import span
from ..token_logits import RowReader
from .lm_reference import Reference


@dataclass(frozen=True)
class TokenValues:
    """Reads logits as `ConsistencyLensModel.forward` has them read; the values are named as the attributes.

    Attributes:
        log_probability: whether that of each token is wanted, in nats.
        entropy: whether that of each distribution is wanted, in nats.
        entropy_gradient: whether it has a gradient.
        divergence: the reference that the divergence between decoder and reference is wanted from, in nats.
        lm_direction: "forward" is KL(reference || decoder); "reverse" is KL(decoder || reference).
        lm_estimator: "exact" over the vocabulary, or "k3" from the tokens themselves.
        num_texts: how many texts of the batch, from the first on, are read; None for all.
        chunk_size: rows of logits held at a time, of the reference too; 0 holds all of them.
    """

    log_probability: bool = False
    entropy: bool = False
    entropy_gradient: bool = False
    divergence: Reference | None = None
    lm_direction: str = "reverse"
    lm_estimator: str = "exact"
    num_texts: int | None = None
    chunk_size: int = 0

    def __call__(self, activations: Tensor, ids: Tensor) -> RowReader:
        """What reads the logits of texts (B, T), the reference having read the texts themselves."""
        activations, ids = activations[: self.num_texts], ids[: self.num_texts]
        reference = None
        if self.divergence is not None:
            with span("lm"), torch.no_grad():
                reference = self.divergence(activations, ids, self.chunk_size)
        flat_ids = ids.flatten()

        def read(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            row_ids = flat_ids[rows]
            if len(row_ids) < len(logits):
                logits = logits[: len(row_ids)]  # those of texts that are left out come last
            values = {}
            if self.log_probability:
                values["log_probability"] = token_log_probabilities(logits, row_ids)
            if self.entropy:
                with nullcontext() if self.entropy_gradient else torch.no_grad():
                    values["entropy"] = entropy(logits)
            if reference is not None:
                with span("lm"):
                    with torch.no_grad():
                        expected = reference.of_rows(rows)
                    values["divergence"] = self.divergence_of(logits, expected, row_ids)
            return values

        return read

    def divergence_of(self, logits: Tensor, expected: Tensor, ids: Tensor) -> Tensor:
        """Between decoder and reference at each of n tokens, (n,), from the logits (n, V) of both."""
        if self.lm_estimator == "k3":
            return k3_divergence(token_log_probabilities(logits, ids), token_log_probabilities(expected, ids))
        return kl_divergence(*((expected, logits) if self.lm_direction == "forward" else (logits, expected)))
