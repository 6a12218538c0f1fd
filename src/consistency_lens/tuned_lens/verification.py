"""The verification of a tuned lens: its folder by itself, and what it reads of its model.

Every check is made and reported, not only the first that fails; but nothing is decoded with a model that is not the
lens's own.
"""

import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..context_length import context_length
from ..data.cache_check import Check
from ..data.generation import sample_documents
from ..data.subject_loading import LoadedSubject
from ..hub.artifact_checks import subject_checks
from ..losses import kl_divergence
from .content_checks import content_checks, read_tuned_lens
from .gates import MOST_LAST_LAYER_BITS
from .modeling_tuned_lens import SEED, TunedLens

NUM_LAYERS, NUM_POSITIONS = 10, 100
# The text is the model's own: it is there for any model, and no lens was fitted on these very draws.
NUM_DOCUMENTS, DOCUMENT_TOKENS = 16, 64


class Decoded(NamedTuple):
    """What the lens reads at random layers and positions; all KL from the model's final distribution, in bits."""

    layers: list[int]
    norm_kl: Tensor
    """Of the norm lens, (layers, positions)."""
    tuned_kl: Tensor
    last_layer_kl: Tensor
    """Of the lens's last layer, (positions,)."""


def verify_tuned_lens(path: str | Path, subject: LoadedSubject | None = None) -> list[Check]:
    """Checks a tuned lens: its files by themselves, and with `subject` whether it is the lens of that model.

    Args:
        path: its folder.
        subject: the model, loaded in the precision that the lens was fitted in.

    Returns:
        All checks, in order.
    """
    path = Path(path)
    checks = content_checks(path)
    if subject is None or not checks[0].passed:
        return checks
    pins = read_tuned_lens(path).provenance
    hashes = (pins.get("weights_hash"), pins.get("tokenizer_hash"))
    checks += subject_checks(pins.get("model_commit"), *hashes, subject)
    if not all(check.passed for check in checks if check.name != "gates"):
        untried = "not tried: the checks above did not pass"
        return [*checks, *(Check(name, False, untried, checked=False) for name in ("last layer", "delta KL"))]
    try:
        decoded = decode_at_random(
            TunedLens.from_pretrained(path, base_model=subject.model, verify_base=False), subject
        )
    except ValueError as error:
        return [*checks, Check("decoding", False, str(error))]
    return [*checks, *_decoding_checks(decoded)]


@torch.no_grad()
def decode_at_random(lens: TunedLens, subject: LoadedSubject) -> Decoded:
    """Reads random layers at random positions of text that the model writes; the draws are those of seed 316.

    Raises:
        ValueError: if the model cannot write without a prompt.
    """
    generator = torch.Generator().manual_seed(SEED)
    translated = torch.randperm(lens.num_layers - 1, generator=generator)[:NUM_LAYERS].sort().values.tolist()
    layers = [*translated, lens.num_layers - 1]
    documents = _documents(subject)
    chosen = torch.randperm(sum(map(len, documents)), generator=generator)[:NUM_POSITIONS]
    residuals, final = _read(lens, layers, documents, set(chosen.tolist()))

    def bits_from_final(logits: Tensor) -> Tensor:
        return kl_divergence(final, logits) / math.log(2)

    norm = [bits_from_final(lens.logit_lens(layer, residuals[n])) for n, layer in enumerate(translated)]
    tuned = [bits_from_final(lens.logits(layer, residuals[n])) for n, layer in enumerate(translated)]
    last = bits_from_final(lens.logits(lens.num_layers - 1, residuals[-1]))
    return Decoded(translated, torch.stack(norm), torch.stack(tuned), last)


def _documents(subject: LoadedSubject) -> Sequence[Sequence[int]]:
    context = context_length(subject.model.config)
    length = min(DOCUMENT_TOKENS, context or DOCUMENT_TOKENS)
    documents = sample_documents(subject.model, subject.tokenizer, NUM_DOCUMENTS, length, seed=SEED, progress=False)
    return documents["input_ids"][:]


def _read(
    lens: TunedLens, layers: Sequence[int], documents: Sequence[Sequence[int]], chosen: Container[int]
) -> tuple[Tensor, Tensor]:
    """Residuals (layers, N, d) at N chosen positions, counted over all documents, and the model's logits there (N, V).

    Only these are kept, for the logits of whole documents would be large.
    """
    residuals, logits, before = [], [], 0
    for document in documents:
        ids = torch.tensor([document])
        own = [position for position in range(len(document)) if before + position in chosen]
        before += len(document)
        outputs = lens.block_outputs(ids, layers)
        residuals.append(torch.stack([output[0, own].to(lens.readout.device) for output in outputs]))
        found = lens.subject_model(input_ids=ids.to(lens.subject_model.device), use_cache=False).logits[0, own]
        logits.append(found.to(lens.readout.device, torch.float32))
    return torch.cat(residuals, dim=1), torch.cat(logits)


def _decoding_checks(decoded: Decoded) -> list[Check]:
    last = float(decoded.last_layer_kl.mean())
    gain = float((decoded.norm_kl - decoded.tuned_kl).median())
    where = f"at {decoded.norm_kl.shape[1]} positions of layers {', '.join(map(str, decoded.layers))}"
    return [
        Check(
            "last layer",
            last <= MOST_LAST_LAYER_BITS,
            f"KL from the model's head {last:.2g} bits (gate C: at most {MOST_LAST_LAYER_BITS:g})",
        ),
        Check("delta KL", gain > 0, f"median of KL of the norm lens - KL of the tuned lens: {gain:+.3f} bits {where}"),
    ]
