"""What a sweep says of each prompt, of each layer, and of how far its lenses are to be trusted.

Two diagnostics: at the last layer both lenses have to be the model's own head; and what a lens shows calls for care
where the raw logit lens (no norm) shows another thing, which `lens_artifact_risk` sums up.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kpis import best_temperature
from .readings import NORM, TUNED, LensReading, PromptResult
from .records import first_ranks

# The largest over layers of the median KL(lens || raw lens), in bits, from which on the risk is medium, high.
MEDIUM_RISK_BITS, HIGH_RISK_BITS = 0.5, 1.0
RISKS = ("low", "medium", "high")


def prompt_entry(result: PromptResult, text_of: Callable[[int], str]) -> dict[str, Any]:
    """A prompt as the run JSON has it: what was asked, the tokens it became, and each lens's milestones."""
    tokens = result.tokens
    return {
        **asdict(tokens.prompt),
        "tokens": len(tokens.ids),
        "answer_id": tokens.answer_id,
        "answer_token": None if tokens.answer_id is None else text_of(tokens.answer_id),
        "answer_is_one_token": tokens.answer_is_one_token,
        **{name: first_ranks(reading) for name, reading in result.lenses.items()},
    }


def layer_figures(results: Sequence[PromptResult]) -> list[dict[str, Any]]:
    """One entry a layer: medians of each lens over all positions, and what became of the answers.

    The calibrated norm lens's is None where no temperatures of its own were fitted.
    """
    lenses = {name: _lens_figures([result.lenses[name] for result in results]) for name in results[0].lenses}
    kls = [result.calibrated_kl_bits for result in results if result.calibrated_kl_bits is not None]
    calibrated, num_layers = _median(kls) if kls else [], len(lenses[NORM])
    return [
        {
            "layer": layer,
            **{name: figures[layer] for name, figures in lenses.items()},
            "calibrated_norm": {"kl_from_final_bits": calibrated[layer] if kls else None},
        }
        for layer in range(num_layers)
    ]


def diagnostics(results: Sequence[PromptResult]) -> dict[str, Any]:
    """The last layer against the model's own output, and each lens against the raw one."""
    names = list(results[0].lenses)
    temperature, after = best_temperature([result.last_layer_kl_bits.double().numpy() for result in results])
    head = {name: torch.cat([result.head_kl_bits[name] for result in results]) for name in names}
    raw = {name: _against_raw(results, name) for name in names if results[0].raw_kl_bits}
    risks = {name: artifact_risk(of["max_kl_bits"], of["answers_on_top_not_in_raw"]) for name, of in raw.items()}
    return {
        "last_layer": {
            **{name: {"mean_kl_bits": float(kl.mean()), "max_kl_bits": float(kl.max())} for name, kl in head.items()},
            "kl_after_temp_bits": after,
            "temperature": temperature,
        },
        "raw_lens": raw,
        "lens_artifact_risk": risks,
        "tuned_lens_raises_risk": TUNED in risks and RISKS.index(risks[TUNED]) > RISKS.index(risks[NORM]),
    }


def artifact_risk(max_kl_bits: float, answers_not_in_raw: int) -> str:
    """How far a lens may show what its norm makes, not what the residual says: "low", "medium" or "high".

    Args:
        max_kl_bits: the largest over layers of the median KL(lens || raw lens).
        answers_not_in_raw: layers, of all prompts, with the answer on top under the lens and not under the raw one.
    """
    if max_kl_bits >= HIGH_RISK_BITS or answers_not_in_raw:
        return "high"
    return "medium" if max_kl_bits >= MEDIUM_RISK_BITS else "low"


def _lens_figures(readings: Sequence[LensReading]) -> list[dict[str, Any]]:
    """One entry a layer; the answers' are None without answers."""
    entropy = _median([reading.entropy_bits for reading in readings])
    kl = _median([reading.kl_from_final_bits for reading in readings])
    cosine = _median([reading.cos_to_final for reading in readings])
    ranks = [reading.answer_rank for reading in readings if reading.answer_rank is not None]
    rank: Sequence[float | None] = [None] * len(kl)
    on_top = rank
    if ranks:
        by_layer = torch.stack(ranks, dim=1)
        rank, on_top = _median([by_layer]), (by_layer == 1).double().mean(dim=1).tolist()
    names = ("kl_from_final_bits", "entropy_bits", "cos_to_final", "answer_rank", "share_of_answers_on_top")
    return [dict(zip(names, of, strict=True)) for of in zip(kl, entropy, cosine, rank, on_top, strict=True)]


def _median(figures: Sequence[Tensor]) -> list[float]:
    """Of (L, S) tensors over all their positions, (L,)."""
    return np.median(torch.cat(list(figures), dim=1).double().numpy(), axis=1).tolist()


def _against_raw(results: Sequence[PromptResult], name: str) -> dict[str, Any]:
    medians = _median([result.raw_kl_bits[name] for result in results])
    only_here = 0
    for result in results:
        rank = result.lenses[name].answer_rank
        if rank is not None and result.raw_rank is not None:
            only_here += int(((rank == 1) & (result.raw_rank != 1)).sum())
    return {"median_kl_bits": medians, "max_kl_bits": max(medians), "answers_on_top_not_in_raw": only_here}
