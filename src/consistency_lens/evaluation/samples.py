"""Sample rows for people to read: a context, the lens's words for its last token, and what the words were worth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..atomic_write import write_text
from ..cached_passes import evaluating
from ..context_length import context_length
from ..data.activation_source import Rows, rows_at
from ..data.collator import ActivationCollator
from ..explanation import top_tokens
from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from .evaluated import Batch, judge
from .metrics import squared_error

# Documents looked at for each sample that is kept, so that the positions can be spread.
CANDIDATES = 8
BATCH = 32  # samples read side by side
CONTINUATION_TOKENS = 12


@dataclass(frozen=True)
class Sample:
    """One activation of a held-out document, in words.

    Attributes:
        document: hash of the document.
        position: P.
        context: the text up to the token at P, that token between « and ».
        explanation: the lens's text.
        true_tail: the true last T tokens of the context.
        continuation: how the subject goes on after the context, greedily.
        fve: 1 - |A - Â|² / |A - mean|² of this one activation.
        kl: KL(p(.|A) || p(.|Â)) in nats.
        top_before, top_after: the subject's likeliest next tokens with their probabilities, with A and with Â.
    """

    document: int
    position: int
    context: str
    explanation: str
    true_tail: str
    continuation: str
    fve: float
    kl: float
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]


class TrackedSamples:
    """A fixed choice of rows of different documents, from early to late positions, to be read as the lens changes.

    What the lens has no part in, the continuations above all, is computed once.

    Args:
        lens: with its tokenizer and subject.
        rows: held-out rows of a cache.
        collator: for the lens's T.
        count: how many; fewer where there are fewer documents.
        seed: of the choice, which the lens has no part in.

    Raises:
        ValueError: if there are no rows, or `count` is below 1.
    """

    def __init__(
        self, lens: ConsistencyLensModel, rows: Rows, collator: ActivationCollator, count: int = 12, seed: int = 0
    ) -> None:
        if len(rows) == 0 or count < 1:
            raise ValueError(f"samples: got {len(rows)} rows and count={count}; both must be at least 1")
        self.lens = lens
        chosen = choose_rows(rows, count, seed)
        self.batches = [collator(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]
        tokenizer = lens.require_tokenizer()
        self.fixed: list[dict[str, Any]] = []
        for batch in self.batches:
            tails = zip(batch["tail_ids"], batch["tail_mask"], strict=True)
            contexts = zip(batch["input_ids"], batch["positions"].tolist(), strict=True)
            columns = {
                "document": batch["document"].tolist(),
                "position": batch["positions"].tolist(),
                "context": [marked_context(tokenizer, ids, position) for ids, position in contexts],
                "true_tail": [str(tokenizer.decode(ids[mask])) for ids, mask in tails],
                "continuation": continuations(lens, batch),
            }
            self.fixed += as_rows(columns)

    @torch.no_grad()
    def read(self) -> list[Sample]:
        """The rows in the lens's words of now, by greedy text."""
        with evaluating(self.lens):
            read = [row for batch in self.batches for row in self._read(batch)]
        return [Sample(**fixed, **row) for fixed, row in zip(self.fixed, read, strict=True)]

    def _read(self, batch: Batch) -> list[dict[str, Any]]:
        """What the lens makes of the rows of a batch: the other half of a sample's attributes."""
        lens, tokenizer = self.lens, self.lens.require_tokenizer()
        batch = {name: tensor.to(lens.device) for name, tensor in batch.items()}
        decoded = lens.decode(batch["activations"])
        reconstructions = lens.encode(decoded.token_ids)
        before, after = (logits[:, 0] for logits in judge(lens.subject, batch, reconstructions[:, None]))
        activations = batch["activations"].cpu()
        error = squared_error(activations, reconstructions.cpu())
        columns = {
            "explanation": decoded.texts,
            "fve": (1 - error / squared_error(activations, lens.mean.cpu())).tolist(),
            "kl": kl_divergence(before, after).tolist(),
            "top_before": top_tokens(before, tokenizer),
            "top_after": top_tokens(after, tokenizer),
        }
        return as_rows(columns)


def collect_samples(
    lens: ConsistencyLensModel, rows: Rows, collator: ActivationCollator, count: int = 12, seed: int = 0
) -> list[Sample]:
    """Reads rows of different documents with greedy text; see `TrackedSamples` for arguments and errors."""
    return TrackedSamples(lens, rows, collator, count, seed).read()


@torch.no_grad()
def continuations(lens: ConsistencyLensModel, batch: Batch) -> list[str]:
    """How the subject itself goes on after each context, greedily, up to EOS or `CONTINUATION_TOKENS`.

    Args:
        lens: with its tokenizer and subject.
        batch: from `data.collator.ActivationCollator`, of B rows.

    Returns:
        B texts; empty where the longest context leaves the subject no position.
    """
    model, tokenizer = lens.subject.model, lens.require_tokenizer()
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    longest = input_ids.shape[1]
    limit = context_length(model.config)
    count = CONTINUATION_TOKENS if limit is None else min(CONTINUATION_TOKENS, limit - longest)
    if count < 1:
        return [""] * len(input_ids)
    # Generation appends at the right end, so padding has to stand on the left.
    order = attention_mask.argsort(dim=1, stable=True)
    eos = tokenizer.eos_token_id
    # What is left unset here would come from the model's own settings for generation, such as a repetition penalty.
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, num_beams=1, repetition_penalty=1.0, eos_token_id=eos, pad_token_id=eos
    )
    output = model.generate(
        input_ids.gather(1, order).to(lens.device),
        attention_mask=attention_mask.gather(1, order).to(lens.device),
        generation_config=settings,
    )
    rows = output[:, longest:].tolist()
    return [str(tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)) for ids in rows]


def as_rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of one length as one dict a row."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def choose_rows(rows: Rows, count: int, seed: int) -> list[dict[str, Any]]:
    """At most `count` rows, no two of one document, evenly spread over the sorted positions of a random few."""
    found: dict[int, dict[str, Any]] = {}
    order, wanted = np.random.default_rng(seed).permutation(len(rows)).tolist(), CANDIDATES * count
    while order and len(found) < wanted:
        missing = wanted - len(found)
        for row in rows_at(rows, order[:missing]):
            found.setdefault(int(row["document"]), row)
        order = order[missing:]
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
