"""What a step optimises: small classes, batch in, dictionary of losses out.

Each objective goes through `lens.forward` exactly once a step (DDP, FSDP and DeepSpeed hook that call), returns its
terms unweighted, and names them as the weights in `ConsistencyLensTrainingArguments` are named.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..evaluation.metrics import start_token
from ..losses import (
    entropy,
    functional_target,
    kl_divergence,
    normalised_mse,
    token_cross_entropy,
)
from ..modeling_consistency_lens import ConsistencyLensModel, LensDecoder
from ..straight_through import row_keys
from ..subject import Subject

Batch = dict[str, Tensor]
# (activations (B, d), text ids (B, T)) -> the reference's logits (B, T, V) for each token of the text
Reference = Callable[[Tensor, Tensor], Tensor]

ADVANTAGE_EPS = 1e-4  # in units of normalised squared error


@dataclass
class Step:
    """Where training stands when a batch is handled.

    Attributes:
        seed, number: with a row's index they fix its sampling noise, whatever process handles the row.
        tau: temperature of the straight-through gradient.
    """

    seed: int
    number: int
    tau: float = 1.0

    def keys(self, rows: Tensor, draw: int = 0) -> Tensor:
        """Noise keys (B,) for the rows with the given cache indices; `draw` tells several samples of one row apart."""
        return row_keys(self.seed, self.number, rows, draw)


@dataclass
class Losses:
    """Terms of one batch.

    Attributes:
        terms: name -> scalar with gradient, not yet weighted.
        metrics: name -> scalar, only to be logged.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Batch in, losses out. `model` is the (possibly wrapped) lens, `lens` the same without wrapper."""

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses: ...


@dataclass
class WarmStart:
    """Self-supervised start: no labels, no API.

    The decoder predicts the last T tokens of the context from the activation at their end (cross-entropy, `ce`); the
    encoder regresses the activation (`mse`) from those tokens and, for `own_share` of the rows, from the decoder's own
    samples, so that it has read the texts that it will be given later.
    """

    own_share: float = 0.0

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses:
        activations, tail_ids = batch["activations"], batch["tail_ids"]
        keys = step.keys(batch["rows"])
        # which rows read an own text belongs to the row and the step, not to how the batch is split over processes
        own = (keys & 0xFFFF) < self.own_share * 2**16
        encoder_ids = tail_ids.clone()
        if own.any():
            encoder_ids[own] = lens.decode_ids(activations[own], keys=keys[own])
        output = model(activations=activations, text_ids=tail_ids, encoder_text_ids=encoder_ids)
        mse = normalised_mse(activations, output.reconstruction, lens.rms)
        terms = {"ce": token_cross_entropy(output.logits, tail_ids, batch["tail_mask"]).mean(), "mse": mse.mean()}
        metrics = {
            "mse_true_text": mse[~own].sum() / (~own).sum().clamp(min=1),
            "mse_own_text": mse[own].sum() / own.sum().clamp(min=1),
        }
        return Losses(terms, metrics)


@dataclass
class Gumbel:
    """Consistency training: generate softly, reconstruct, and let the subject judge the reconstruction.

    `kl`: KL(p(.|A) || p(.|Â)) in nats at position P. `lm`: divergence between the decoder's next-token distributions
    along its own text and a reference's. `mse`: normalised. `entropy`: of the decoder, to be subtracted.

    Args:
        subject: the frozen model being read.
        reference: what the text is held close to; None without an `lm` term.
        lm_direction: "forward" is KL(reference || decoder); "reverse" is KL(decoder || reference),
            which punishes words that the reference would not say.
        delta_residual: "none": Â is judged; "detached" or "full": Â + (A' - Â') is, without or with the gradient of
            the second term (a second activation A' then goes through the lens in the same pass).
        needs_kl: whether the KL has any weight; without one the subject need not run.
    """

    subject: Subject
    reference: Reference | None
    lm_direction: str = "forward"
    delta_residual: str = "none"
    needs_kl: bool = True

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses:
        activations = batch["activations"]
        keys = step.keys(batch["rows"])
        if self.delta_residual == "none":
            output = model(activations=activations, noise_keys=keys, tau=step.tau)
            reconstruction = judged = output.reconstruction
            logits, ids = output.logits, output.text_ids
        else:
            both = torch.cat([activations, batch["other_activations"]])
            both_keys = torch.cat([keys, step.keys(batch["rows"], draw=1)])
            output = model(activations=both, noise_keys=both_keys, tau=step.tau)
            reconstruction, other = output.reconstruction.chunk(2)
            judged = functional_target(
                reconstruction, batch["other_activations"], other, detach=self.delta_residual == "detached"
            )
            logits, ids = output.logits[: len(activations)], output.text_ids[: len(activations)]

        terms = {
            "mse": normalised_mse(activations, reconstruction, lens.rms).mean(),
            "entropy": entropy(logits).mean(),
        }
        if self.needs_kl:
            terms["kl"] = functional_kl(self.subject, batch, judged).mean()
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(activations, ids)
            pair = (reference, logits) if self.lm_direction == "forward" else (logits, reference)
            terms["lm"] = kl_divergence(*pair).mean()
        return Losses(terms)


@dataclass
class PolicyGradient:
    """Group-relative policy gradient (GRPO, Shao et al. 2024, arXiv:2402.03300), one update a rollout.

    For each activation the decoder samples `group_size` texts (no gradient, with the KV cache); one teacher-forced
    pass scores them and lets the encoder read them. Reward: `-mse` of the reconstruction, normalised within the group
    to an advantage. `policy`: -advantage x mean log-probability of the text. `mse`: the encoder regresses on the same
    samples.
    `lm`: KL(decoder || reference) at every token, exact over the vocabulary.

    Args:
        reference: what the text is held close to; None without an `lm` term.
        group_size: G, at least 2.
    """

    reference: Reference | None
    group_size: int = 4

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses:
        activations = batch["activations"].repeat_interleave(self.group_size, dim=0)
        draws = [step.keys(batch["rows"], draw) for draw in range(self.group_size)]
        ids = lens.decode_ids(activations, keys=torch.stack(draws, dim=1).flatten())
        output = model(activations=activations, text_ids=ids)
        mse = normalised_mse(activations, output.reconstruction, lens.rms)
        advantage = group_advantage(-mse.detach(), self.group_size)
        log_probability = -token_cross_entropy(output.logits, ids)
        terms = {"policy": -(advantage * log_probability).mean(), "mse": mse.mean()}
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(activations, ids)
            terms["lm"] = kl_divergence(output.logits, reference).mean()
        with torch.no_grad():
            groups = mse.view(-1, self.group_size)
            metrics = {
                "entropy": entropy(output.logits).mean(),
                "reward_spread": groups.std(dim=1).mean(),
                "zero_advantage_share": (groups.std(dim=1) < ADVANTAGE_EPS).float().mean(),
            }
        return Losses(terms, metrics)


def group_advantage(rewards: Tensor, group_size: int) -> Tensor:
    """(r - mean) / (std + eps) within each group of consecutive rewards (B * G,); 0 where all are equal."""
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + ADVANTAGE_EPS)).flatten()


def functional_kl(subject: Subject, batch: Batch, reconstruction: Tensor) -> Tensor:
    """KL(p(.|A) || p(.|Â)) in nats for each row, (B,): what the subject would predict instead."""
    positions = batch["positions"][:, None]
    context = subject.context(batch["input_ids"], batch["attention_mask"], positions)
    replaced = subject.replaced_logits(context, reconstruction[:, None])
    return kl_divergence(context.logits, replaced)[:, 0]


@dataclass
class SubjectReference:
    """The subject as LM reference: it reads the text after BOS (or EOS, if it has no BOS), and no activation."""

    subject: Subject

    def __call__(self, activations: Tensor, ids: Tensor) -> Tensor:
        start = torch.full_like(ids[:, :1], start_token(self.subject.model.config.get_text_config()))
        return self.subject.model(input_ids=torch.cat([start, ids[:, :-1]], dim=1), use_cache=False).logits


def freeze_copy(decoder: LensDecoder) -> LensDecoder:
    """A frozen copy of a decoder: trained tensors copied, frozen ones shared."""
    memo: dict[int, Any] = {id(t): t for t in decoder.parameters() if not t.requires_grad}
    return copy.deepcopy(decoder, memo).requires_grad_(False).eval()
