"""What a step optimises: small classes, batch in, dictionary of losses out.

Each objective goes through `lens.forward` with gradients exactly once a step (DDP, FSDP and DeepSpeed hook that call),
returns its terms unweighted, and names them as the weights in `ConsistencyLensTrainingArguments` are named. Which
passes it makes depends on its settings alone, never on the rows: processes that share the weights make them together.
Nothing random comes from a generator: a row and a step fix what is drawn for it, whatever process handles the row.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..evaluation.evaluated import judged_kl
from ..losses import ADVANTAGE_EPS, functional_target, group_advantage, masked_mean, normalised_mse
from ..modeling_consistency_lens import ConsistencyLensModel
from ..spans import span
from ..straight_through import fold_in, row_keys
from ..subject import Subject
from .arguments import ConsistencyLensTrainingArguments
from .lm_reference import Reference
from .tails import Tails, last_true
from .token_values import TokenValues

Batch = dict[str, Any]


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
        rows: of metrics that are means over some rows of the batch alone: over how many, which may be none.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Batch in, losses out. `model` is the (possibly wrapped) lens, `lens` the same without wrapper."""

    @property
    def needs_kl(self) -> bool:
        """Whether the subject judges reconstructions."""
        ...

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses: ...


@dataclass
class WarmStart:
    """Self-supervised start: no labels, no API.

    The decoder predicts the last T tokens of the context from the activation at their end (cross-entropy, `ce`); the
    encoder regresses the activation (`mse`) from those tokens and, for `own_share` of the rows, from the decoder's own
    samples, so that it has read the texts that it will be given later. For `shorter_share` of the rows the tail has
    only t tokens, t uniform in 1..T: the encoder reads no more than these, and a decoder with a stop token learns to
    write them and to stop. A row that brings a text of its own, such as a summary, has it whole in place of a tail.

    `chunk_size`: rows of logits held at a time (`token_logits`); 0 holds all of them.
    """

    own_share: float = 0.0
    shorter_share: float = 0.0
    chunk_size: int = 0
    needs_kl: ClassVar[bool] = False

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses:
        activations, length = batch["activations"], batch["tail_ids"].shape[1]
        keys = step.keys(batch["rows"])
        # what a row reads belongs to the row and the step, not to how the batch is split over processes
        shorter, own = uniform(keys, 0) < self.shorter_share, uniform(keys, 1) < self.own_share
        shorter = shorter & ~batch["given_text"]
        limits = torch.where(shorter, 1 + (uniform(keys, 2) * length).long(), length)
        stops = lens.config.decoder.stop_token_id is not None
        tails = Tails.of(batch, limits, lens.config.decoder.stop_token_id)
        read_ids, read_mask = tails.ids.clone(), tails.read_mask.clone()
        if self.own_share > 0:
            own_ids, own_mask = read_ids.clone(), read_mask.clone()
            # by slices of the batch, for processes that share the weights must make as many passes: one in each
            for drawn in self.rows_to_decode(own):
                own_ids[drawn] = lens.decode_ids(activations[drawn], keys=keys[drawn])
                own_mask[drawn] = lens.text_mask(own_ids[drawn])
            if not stops:  # a decoder that stops by itself has chosen the length already
                own_mask = last_true(own_mask, limits)
            read_ids = torch.where(own[:, None], own_ids, read_ids)
            read_mask = torch.where(own[:, None], own_mask, read_mask)
        output = model(
            activations=activations,
            text_ids=tails.ids,
            encoder_text_ids=read_ids,
            encoder_text_mask=read_mask,
            reader=TokenValues(log_probability=True),
            chunk_size=self.chunk_size,
        )
        mse = normalised_mse(activations, output.reconstruction, lens.rms)
        cross_entropy = masked_mean(-output.token_values["log_probability"], tails.mask)
        terms = {"ce": cross_entropy.mean(), "mse": mse.mean()}
        # not by selecting rows, for which the device would have to say how many they are
        parts = {"mse_true_text": ~own, "mse_own_text": own}
        metrics = {name: mse.masked_fill(~part, 0).sum() / part.sum().clamp(min=1) for name, part in parts.items()}
        return Losses(terms, metrics, {name: part.sum() for name, part in parts.items()})

    def rows_to_decode(self, own: Tensor) -> Iterator[Tensor]:
        """The rows (B,) bool that are `own`, slice after slice of the batch, with no more rows than logits are held.

        One row at least in each, though it be read by none.
        """
        places = torch.arange(len(own), device=own.device)
        size = self.chunk_size or len(own)
        for start in range(0, len(own), size):
            chosen = own & (places >= start) & (places < start + size)
            yield chosen | (~chosen.any() & (places == start))


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
            the second term. A batch with `mates` (B,) has A' and Â' among its own rows; `other_activations` (B, d) go
            through the lens for it, in the same pass where they have a gradient.
        needs_kl: whether the KL has any weight; without one the subject need not run.
        needs_entropy: whether the entropy has any weight; without one it is only logged, and has no gradient.
        chunk_size: rows of logits held at a time (`token_logits`); 0 holds all of them.
    """

    subject: Subject
    reference: Reference | None
    lm_direction: str = "forward"
    delta_residual: str = "none"
    needs_kl: bool = True
    needs_entropy: bool = True
    chunk_size: int = 0

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses:
        activations = batch["activations"]
        keys = step.keys(batch["rows"])
        wanted = TokenValues(
            entropy=True,
            entropy_gradient=self.needs_entropy,
            divergence=self.reference,
            lm_direction=self.lm_direction,
            num_texts=len(activations),
            chunk_size=self.chunk_size,
        )
        settings = {"tau": step.tau, "reader": wanted, "chunk_size": self.chunk_size}
        own_pass = self.takes_own_pass(batch)
        if own_pass and self.delta_residual == "full":
            both = torch.cat([activations, batch["other_activations"]])
            both_keys = torch.cat([keys, step.keys(batch["rows"], draw=1)])
            output = model(activations=both, noise_keys=both_keys, **settings)
            reconstruction, other = output.reconstruction.chunk(2)
        else:
            other = self.other_reconstruction(lens, batch, step) if own_pass else None
            output = model(activations=activations, noise_keys=keys, **settings)
            reconstruction = output.reconstruction
        judged = reconstruction
        if self.delta_residual != "none":
            others = batch["other_activations"] if own_pass else activations[batch["mates"]]
            other = reconstruction[batch["mates"]] if other is None else other
            judged = functional_target(reconstruction, others, other, detach=self.delta_residual == "detached")

        drawn = lens.drawn_mask(output.text_ids[: len(activations)])
        terms = {"mse": normalised_mse(activations, reconstruction, lens.rms).mean()}
        spread = {"entropy": masked_mean(output.token_values["entropy"], drawn).mean()}
        if self.needs_kl:
            terms["kl"] = functional_kl(self.subject, batch, judged[:, None], self.chunk_size).mean()
        if self.reference is not None:
            terms["lm"] = masked_mean(output.token_values["divergence"], drawn).mean()
        return Losses(terms | spread) if self.needs_entropy else Losses(terms, spread)

    def takes_own_pass(self, batch: Batch) -> bool:
        """Whether A' goes through the lens for itself, being no row of the batch; ValueError where there is none."""
        if self.delta_residual == "none" or "mates" in batch:
            return False
        if "other_activations" not in batch:
            raise ValueError(
                f"delta_residual: {self.delta_residual} takes a second activation A', but the rows of a batch have "
                "none; make them with a pair_seed"
            )
        return True

    @torch.no_grad()
    def other_reconstruction(self, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Tensor:
        """Â' (B, d) where no gradient passes through it: neither logits nor activations are kept."""
        keys = step.keys(batch["rows"], draw=1)
        ids = lens.decode_ids(batch["other_activations"], keys=keys, chunk_size=self.chunk_size)
        return lens.read_ids(ids)


@dataclass
class PolicyGradient:
    """Group-relative policy gradient (GRPO, Shao et al. 2024, arXiv:2402.03300), one update a rollout.

    For each activation the decoder samples G texts (no gradient, with the KV cache); one teacher-forced pass scores
    them and lets the encoder read them. `policy`: -advantage x log-probability of the text / T, the advantage being
    the reward against those of the group. `mse`: the encoder regresses on the same samples. `lm`: the divergence
    between decoder and reference at every token of the text.

    Args:
        reference: what the text is held close to; None without an `lm` term.
        group_size: G, at least 2.
        reward: "-mse" or "-log_mse" of the reconstruction (normalised), or "-kl", what the subject makes of it.
        subject: the model being read, for the reward "-kl".
        scale_advantage: whether rewards are divided by the spread of their group; if not, they are only centred.
        lm_direction: "reverse" is KL(decoder || reference), "forward" the other.
        lm_estimator: "exact" over the vocabulary, or "k3" from the sampled tokens (`losses.k3_divergence`), reverse.
        prefix_budgets: the encoder reads only the first t tokens, t uniform in 1..T for each group, so that the
            important words come first.
        length_penalty: what a text of T tokens loses of its reward, shorter ones in proportion; it takes a decoder
            with a stop token.
        straight_through: lets `mse` also reach the decoder, through the embedding of each sampled token. This tells
            which other token would have been better, which the reward of a whole text does not; it is biased, for it
            is linear and leaves out what the later tokens would have been.
        chunk_size: rows of logits held at a time (`token_logits`); 0 holds all of them.
    """

    reference: Reference | None
    group_size: int = 4
    reward: str = "-mse"
    subject: Subject | None = None
    scale_advantage: bool = True
    lm_direction: str = "reverse"
    lm_estimator: str = "exact"
    prefix_budgets: bool = False
    length_penalty: float = 0.0
    straight_through: bool = False
    chunk_size: int = 0

    @property
    def needs_kl(self) -> bool:
        """Whether the subject judges reconstructions."""
        return self.reward == "-kl"

    def __call__(self, model: nn.Module, lens: ConsistencyLensModel, batch: Batch, step: Step) -> Losses:
        activations = batch["activations"].repeat_interleave(self.group_size, dim=0)
        texts = self.sample(lens, batch, step)
        wanted = TokenValues(
            log_probability=True,
            entropy=True,
            divergence=self.reference,
            lm_direction=self.lm_direction,
            lm_estimator=self.lm_estimator,
            chunk_size=self.chunk_size,
        )
        output = model(
            activations=activations,
            text_ids=texts.ids,
            encoder_text_mask=texts.read,
            straight_through=self.straight_through,
            tau=step.tau,
            reader=wanted,
            chunk_size=self.chunk_size,
        )
        mse = normalised_mse(activations, output.reconstruction, lens.rms)
        rewards = self.rewards(batch, output.reconstruction.detach(), mse.detach())
        rewards = rewards - self.length_penalty * texts.text.float().mean(dim=1)
        advantage = group_advantage(rewards, self.group_size, self.scale_advantage)
        values = output.token_values
        # divided by T and not by the text's own length, which would favour long texts where the advantage is negative
        score = values["log_probability"].masked_fill(~texts.credited, 0).mean(dim=1)
        terms = {"policy": -(advantage * score).mean(), "mse": mse.mean()}
        if self.reference is not None:
            terms["lm"] = masked_mean(values["divergence"], texts.drawn).mean()
        with torch.no_grad():
            spread = rewards.view(-1, self.group_size).std(dim=1)
            metrics = {
                "entropy": masked_mean(values["entropy"], texts.drawn).mean(),
                "reward": rewards.mean(),
                "reward_spread": spread.mean(),
                "zero_advantage_share": (spread < ADVANTAGE_EPS).float().mean(),
                "text_length": texts.text.float().sum(dim=1).mean(),
            }
        return Losses(terms, metrics)

    def sample(self, lens: ConsistencyLensModel, batch: Batch, step: Step) -> "SampledTexts":
        """G texts for each row of the batch, those of a row one after the other."""
        keys = torch.stack([step.keys(batch["rows"], draw) for draw in range(self.group_size)], dim=1)
        activations = batch["activations"].repeat_interleave(self.group_size, dim=0)
        ids = lens.decode_ids(activations, keys=keys.flatten(), chunk_size=self.chunk_size)
        text, drawn = lens.text_mask(ids), lens.drawn_mask(ids)
        if not self.prefix_budgets:
            return SampledTexts(ids, text, drawn, None, drawn)
        budgets = 1 + (uniform(keys[:, 0], 0) * ids.shape[1]).long()
        within = torch.arange(ids.shape[1], device=ids.device) < budgets.repeat_interleave(self.group_size)[:, None]
        return SampledTexts(ids, text, drawn, text & within, drawn & within)

    def rewards(self, batch: Batch, reconstruction: Tensor, mse: Tensor) -> Tensor:
        """The reward of each text, (B * G,), from its reconstruction (B * G, d) and the error of that."""
        if self.reward == "-mse":
            return -mse
        if self.reward == "-log_mse":
            return -mse.log()
        assert self.subject is not None
        groups = reconstruction.view(-1, self.group_size, reconstruction.shape[-1])
        return -functional_kl(self.subject, batch, groups, self.chunk_size).flatten()


class SampledTexts(NamedTuple):
    """Texts `ids` (N, T), and masks (N, T): `text`, what lies before a stop token; `drawn`, what the decoder drew,
    the stop token included; `read`, what the encoder reads (None: the text); `credited`, what earns the reward."""

    ids: Tensor
    text: Tensor
    drawn: Tensor
    read: Tensor | None
    credited: Tensor


def uniform(keys: Tensor, salt: int) -> Tensor:
    """One number in [0, 1) for each key (B,); another `salt` gives independent ones."""
    # far from the counters of a text's tokens, which are folded into the same keys
    return (fold_in(keys, (1 << 32) + salt) & 0xFFFFFF).float() / 2**24


def functional_kl(subject: Subject, batch: Batch, reconstructions: Tensor, chunk_size: int = 0) -> Tensor:
    """KL(p(.|A) || p(.|Â)) in nats for n reconstructions of each row, (B, n, d) -> (B, n): what the subject would
    predict instead."""
    with span("kl"), in_full_precision(reconstructions):
        return judged_kl(subject, batch, reconstructions, chunk_size)


def in_full_precision(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on the tensor's device: the subject judges in the precision that it was loaded in."""
    return torch.autocast(tensor.device.type, enabled=False)


def make_objective(
    name: str, args: ConsistencyLensTrainingArguments, subject: Subject, reference: Reference | None
) -> Objective:
    """An objective by its name ("warm_start", "gumbel" or "policy_gradient"), with the settings of the arguments.

    Args:
        subject: the frozen model being read.
        reference: what text is held close to; None without an `lm` term.
    """
    if name == "warm_start":
        return WarmStart(args.own_share, args.shorter_share, args.logits_chunk_size)
    if name == "policy_gradient":
        return PolicyGradient(
            reference=reference,
            group_size=args.group_size,
            reward=args.reward,
            subject=subject,
            scale_advantage=args.scale_advantage,
            lm_direction=args.lm_direction,
            lm_estimator=args.lm_estimator,
            prefix_budgets=args.prefix_budgets,
            length_penalty=args.length_penalty,
            straight_through=args.straight_through,
            chunk_size=args.logits_chunk_size,
        )
    return Gumbel(
        subject=subject,
        reference=reference,
        lm_direction=args.lm_direction,
        delta_residual=args.delta_residual,
        needs_kl=args.has_weight("kl"),
        needs_entropy=args.has_weight("entropy"),
        chunk_size=args.logits_chunk_size,
    )
