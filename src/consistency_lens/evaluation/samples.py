"""Sample rows for people to read: a context, the lens's words for its last token, and what the words were worth."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..atomic_write import write_text
from ..data.collator import ActivationCollator
from ..explanation import top_tokens
from ..lens_decoder import evaluating
from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from .controls import read_ids
from .evaluated import Rows, judge
from .metrics import squared_error

# Documents looked at for each sample that is kept, so that the positions can be spread.
CANDIDATES = 8


@dataclass(frozen=True)
class Sample:
    """One activation of a held-out document, in words.

    Attributes:
        document: hash of the document.
        position: P.
        context: the text up to the token at P, that token between « and ».
        explanation: the lens's text.
        true_tail: the true last T tokens of the context.
        fve: 1 - |A - Â|² / |A - mean|² of this one activation.
        kl: KL(p(.|A) || p(.|Â)) in nats.
        top_before, top_after: the subject's likeliest next tokens with their probabilities, with A and with Â.
    """

    document: int
    position: int
    context: str
    explanation: str
    true_tail: str
    fve: float
    kl: float
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]


@torch.no_grad()
def collect_samples(
    lens: ConsistencyLensModel, rows: Rows, collator: ActivationCollator, count: int = 12, seed: int = 0
) -> list[Sample]:
    """Reads rows of different documents with greedy text, from early to late positions.

    Args:
        lens: with its tokenizer and subject.
        rows: held-out rows of a cache.
        collator: for the lens's T.
        count: how many; fewer where there are fewer documents.
        seed: of the choice, which the lens has no part in.

    Raises:
        ValueError: if there are no rows, or `count` is below 1.
    """
    if len(rows) == 0 or count < 1:
        raise ValueError(f"samples: got {len(rows)} rows and count={count}; both must be at least 1")
    chosen = choose_rows(rows, count, seed)
    batch = {name: tensor.to(lens.device) for name, tensor in collator(chosen).items()}
    with evaluating(lens):
        decoded = lens.decode(batch["activations"])
        reconstructions = read_ids(lens, decoded.token_ids)
    context, logits = judge(lens.subject, batch, reconstructions[:, None])
    before, after = context.logits[:, 0], logits[:, 0]
    activations = batch["activations"].cpu()
    error = squared_error(activations, reconstructions.cpu())
    tokenizer = lens.require_tokenizer()
    columns = (
        batch["document"].tolist(),
        batch["positions"].tolist(),
        [marked_context(tokenizer, row["input_ids"], int(row["position"])) for row in chosen],
        decoded.texts,
        [str(tokenizer.decode(ids[mask])) for ids, mask in zip(batch["tail_ids"], batch["tail_mask"], strict=True)],
        (1 - error / squared_error(activations, lens.mean.cpu())).tolist(),
        kl_divergence(before, after).tolist(),
        top_tokens(before, tokenizer),
        top_tokens(after, tokenizer),
    )
    return [Sample(*values) for values in zip(*columns, strict=True)]


def choose_rows(rows: Rows, count: int, seed: int) -> list[dict[str, Any]]:
    """At most `count` rows, no two of one document, evenly spread over the sorted positions of a random few."""
    found: dict[int, dict[str, Any]] = {}
    for index in np.random.default_rng(seed).permutation(len(rows)):
        row = rows[int(index)]
        found.setdefault(int(row["document"]), row)
        if len(found) == CANDIDATES * count:
            break
    candidates = sorted(found.values(), key=lambda row: int(row["position"]))
    picks = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
    return [candidates[pick] for pick in picks]


def marked_context(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int] | Tensor, position: int) -> str:
    """The text of tokens 0..P without the BOS at its start, the token at P between « and »."""
    ids = [int(token) for token in input_ids[: position + 1]]
    if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
        ids = ids[1:]
    before, whole = str(tokenizer.decode(ids[:-1])), str(tokenizer.decode(ids))
    # Decoded alone a token may lose its leading space; only where it ends a character begun before is there no choice.
    token = whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids[-1:]))
    space = token[: len(token) - len(token.lstrip(" "))]
    return f"{before}{space}«{token[len(space) :]}»"


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Writes samples as JSON lines, whole or not at all."""
    lines = (json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False) for sample in samples)
    write_text(Path(path), "".join(f"{line}\n" for line in lines))
