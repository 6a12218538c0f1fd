"""What the lenses read at every layer and token of a prompt, streamed: logits exist for a few tokens of one layer.

P_final is the readout of the last residual in float32, which is what a tuned lens is fitted to. How far that is from
the logits that the model itself gives is measured beside it, at the last layer (gate C). KL and entropy are in bits.
Shapes: L layers, S tokens of a prompt, d width, V vocabulary, K top tokens, G temperatures.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..losses import entropy, kl_divergence
from .kpis import TEMPERATURES, PromptReading
from .modeling_tuned_lens import TunedLens
from .suite import TokenisedPrompt

NORM, TUNED = "norm", "tuned"
TOP_K = 20
# Logits held at a time, of each of the few distributions that are compared.
CHUNK_LOGITS = 1 << 24

Decode = Callable[[int, Tensor], Tensor]


def bits(nats: Tensor) -> Tensor:
    """Nats in bits."""
    return nats / math.log(2)


@dataclass(frozen=True)
class LensReading:
    """What one lens reads of one prompt; tensors on the CPU."""

    entropy_bits: Tensor
    """Of the lens's distribution, (L, S)."""
    kl_from_final_bits: Tensor
    """KL(P_final || P_layer), (L, S)."""
    kl_to_final_bits: Tensor
    """KL(P_layer || P_final), (L, S)."""
    cos_to_final: Tensor
    """Cosine of the layer's logits and the final ones, each less its mean over the vocabulary, (L, S): a number added
    to all logits changes no probability, so it is not to change the angle."""
    top_ids: Tensor
    """The K likeliest tokens, (L, S, K) int64."""
    top_probabilities: Tensor
    """Their probabilities, (L, S, K)."""
    answer_rank: Tensor | None
    """1 + the number of tokens likelier than the answer at the last position, (L,) int64; None without an answer."""
    answer_probability: Tensor | None
    """(L,)."""


@dataclass(frozen=True)
class PromptResult:
    """What all lenses read of one prompt."""

    tokens: TokenisedPrompt
    lenses: Mapping[str, LensReading]
    """The norm lens, and the tuned lens if there is one."""
    teacher_entropy_bits: Tensor
    """Entropy of P_final, (S,)."""
    calibrated_kl_bits: Tensor | None
    """KL(P_final || P_layer) of the norm lens with its own temperature at each layer, (L, S); None where no such
    temperatures were fitted."""
    raw_kl_bits: Mapping[str, Tensor]
    """KL(lens || raw logit lens) by the lens's name, (L, S); empty where there is no raw one."""
    raw_rank: Tensor | None
    """Rank of the answer under the raw logit lens, (L,)."""
    head_kl_bits: Mapping[str, Tensor]
    """KL(the model's own output || last layer) by the lens's name, (S,)."""
    last_layer_kl_bits: Tensor
    """The same of the norm lens at each of `TEMPERATURES`, (S, G)."""

    def without_top(self) -> Self:
        """The same without the top tokens, which are most of it."""
        none = torch.empty(0)
        lenses = {name: replace(of, top_ids=none, top_probabilities=none) for name, of in self.lenses.items()}
        return replace(self, lenses=lenses)

    def for_kpis(self) -> PromptReading:
        """As far as it goes into the KPIs; there has to be a tuned lens."""
        norm, tuned = self.lenses[NORM], self.lenses[TUNED]
        calibrated = self.calibrated_kl_bits
        ranks = (None if rank is None else rank.numpy() for rank in (norm.answer_rank, tuned.answer_rank))
        return PromptReading(
            self.tokens.prompt.id,
            norm.kl_from_final_bits.double().numpy(),
            None if calibrated is None else calibrated.double().numpy(),
            tuned.kl_from_final_bits.double().numpy(),
            self.last_layer_kl_bits.double().numpy(),
            *ranks,
        )


@torch.no_grad()
def read_prompt(lens: TunedLens, prompt: TokenisedPrompt, with_tuned: bool = True) -> PromptResult:
    """Reads one prompt with the norm lens, the tuned lens and, to compare with, the calibrated and the raw one.

    Args:
        lens: with its subject, of which two passes are run: for the residuals, and for its own logits.
        with_tuned: whether the lens's translators are read; without, it stands for its subject alone.

    Raises:
        ValueError: if a lens gives what is not finite.
    """
    input_ids = torch.tensor([prompt.ids])
    residuals = lens.residuals(input_ids)[:, 0]
    num_layers, length = residuals.shape[:2]
    decoders: dict[str, Decode] = {NORM: lens.logit_lens} | ({TUNED: lens.logits} if with_tuned else {})
    sheets = {name: _Sheet(num_layers, length, lens.readout.vocab_size, prompt.answer_id) for name in decoders}
    teacher_entropy = torch.empty(length)
    calibrated_kl = torch.empty(num_layers, length) if lens.is_calibrated else None
    raw = _RawSheet(lens, num_layers, length, list(decoders), prompt.answer_id)
    for rows in _chunks(length, lens.readout.vocab_size):
        final = lens.logit_lens(num_layers - 1, residuals[-1, rows])
        teacher_entropy[rows] = bits(entropy(final)).cpu()
        for layer, hidden in enumerate(residuals[:, rows]):
            logits = {name: decode(layer, hidden) for name, decode in decoders.items()}
            for name, sheet in sheets.items():
                sheet.fill(layer, rows, logits[name], final)
            if calibrated_kl is not None:
                calibrated = lens.logit_lens(layer, hidden, calibrated=True)
                calibrated_kl[layer, rows] = bits(kl_divergence(final, calibrated)).cpu()
            raw.fill(layer, rows, hidden, logits)
    _check_finite(prompt, sheets)
    return PromptResult(
        tokens=prompt,
        lenses={name: sheet.reading() for name, sheet in sheets.items()},
        teacher_entropy_bits=teacher_entropy,
        calibrated_kl_bits=calibrated_kl,
        raw_kl_bits=raw.kl,
        raw_rank=raw.rank,
        **_against_the_head(lens, input_ids, residuals[-1], decoders),
    )


def rank_of(token: int, logits: Tensor) -> int:
    """1 + the number of tokens with a larger logit (V,) than this one."""
    return 1 + int((logits > logits[token]).sum())


class _Sheet:
    """A `LensReading` that is being filled."""

    def __init__(self, num_layers: int, length: int, vocab_size: int, answer_id: int | None) -> None:
        self.answer_id, self.length, self.top = answer_id, length, min(TOP_K, vocab_size)
        self.figures = torch.empty(4, num_layers, length)
        self.top_ids = torch.empty(num_layers, length, self.top, dtype=torch.long)
        self.top_probabilities = torch.empty(num_layers, length, self.top)
        self.ranks, self.probabilities = torch.empty(num_layers, dtype=torch.long), torch.empty(num_layers)

    def fill(self, layer: int, rows: slice, logits: Tensor, final: Tensor) -> None:
        """Takes in the logits (n, V) of a layer at some positions, beside the final ones."""
        kls = bits(kl_divergence(final, logits)), bits(kl_divergence(logits, final))
        self.figures[:, layer, rows] = torch.stack([bits(entropy(logits)), *kls, _cosine(logits, final)]).cpu()
        probabilities = logits.softmax(dim=-1)
        top = probabilities.topk(self.top, dim=-1)
        self.top_ids[layer, rows], self.top_probabilities[layer, rows] = top.indices.cpu(), top.values.cpu()
        if self.answer_id is not None and rows.stop == self.length:
            self.ranks[layer] = rank_of(self.answer_id, logits[-1])
            self.probabilities[layer] = probabilities[-1, self.answer_id]

    def reading(self) -> LensReading:
        """What was filled in."""
        entropies, kl_from, kl_to, cosine = self.figures
        ranks, probabilities = (None, None) if self.answer_id is None else (self.ranks, self.probabilities)
        return LensReading(
            entropies, kl_from, kl_to, cosine, self.top_ids, self.top_probabilities, ranks, probabilities
        )


class _RawSheet:
    """What the unembedding makes of residuals that are not normalised, and how far the lenses are from it.

    There is none where the head takes another width than the residuals have (OPT-350M).
    """

    def __init__(self, lens: TunedLens, num_layers: int, length: int, names: list[str], answer_id: int | None) -> None:
        self.readout, self.answer_id, self.length = lens.readout, answer_id, length
        self.exists = self.readout.width == self.readout.weight.shape[1]
        self.kl = {name: torch.empty(num_layers, length) for name in names if self.exists}
        has_rank = self.exists and answer_id is not None
        self.rank = torch.empty(num_layers, dtype=torch.long) if has_rank else None

    def fill(self, layer: int, rows: slice, residual: Tensor, logits: Mapping[str, Tensor]) -> None:
        """Takes in the residuals (n, d) of a layer at some positions, and what the lenses make of them."""
        if not self.exists:
            return
        raw = self.readout.logits(residual.to(self.readout.device, torch.float32))
        for name, kl in self.kl.items():
            kl[layer, rows] = bits(kl_divergence(logits[name], raw)).cpu()
        if self.rank is not None and self.answer_id is not None and rows.stop == self.length:
            self.rank[layer] = rank_of(self.answer_id, raw[-1])


def _against_the_head(
    lens: TunedLens, input_ids: Tensor, last: Tensor, decoders: Mapping[str, Decode]
) -> dict[str, Any]:
    """The last layer (S, d) under each lens against the logits that the model itself gives."""
    device = lens.stream.input_embedding.get_parameter("weight").device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate takes the tokens on
    own = lens.subject_model(input_ids=input_ids.to(device), use_cache=False).logits[0]
    head_kl = {name: torch.empty(len(last)) for name in decoders}
    at_temperatures = torch.empty(len(last), len(TEMPERATURES))
    for rows in _chunks(len(last), lens.readout.vocab_size):
        head = own[rows].to(last.device, torch.float32)
        logits = {name: decode(lens.num_layers - 1, last[rows]) for name, decode in decoders.items()}
        for name, kl in head_kl.items():
            kl[rows] = bits(kl_divergence(head, logits[name])).cpu()
        for index, temperature in enumerate(TEMPERATURES.tolist()):
            at_temperatures[rows, index] = bits(kl_divergence(head, logits[NORM] / temperature)).cpu()
    return {"head_kl_bits": head_kl, "last_layer_kl_bits": at_temperatures}


def _cosine(logits: Tensor, final: Tensor) -> Tensor:
    """(n,) from (n, V), both centred."""
    logits, final = (of - of.mean(dim=-1, keepdim=True) for of in (logits, final))
    return torch.cosine_similarity(logits, final, dim=-1)


def _chunks(length: int, vocab_size: int) -> Iterator[slice]:
    """Positions whose logits are held at once."""
    step = max(1, CHUNK_LOGITS // vocab_size)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _check_finite(prompt: TokenisedPrompt, sheets: Mapping[str, _Sheet]) -> None:
    for name, sheet in sheets.items():
        broken = (~sheet.figures.isfinite()).any(dim=0).any(dim=1).nonzero()
        if len(broken):
            raise ValueError(
                f"the {name} lens is not finite at layer {int(broken[0])} of prompt {prompt.prompt.id!r}; "
                "pass another --dtype, such as float32 or bfloat16"
            )
