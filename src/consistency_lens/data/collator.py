"""From rows of an activation cache to one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class ActivationCollator:
    """Collates rows of `data.activation_source.ActivationRows` into tensors.

    Masks come from lengths, never from token ids: in many models the padding token is also EOS.

    Args:
        pad_token_id: fills `input_ids` on the right and `tail_ids` on the left.
        num_text_tokens: T, the length of a tail.
        bos_token_id: where given, a BOS at the start of a context is never part of its tail.

    A batch holds:

    | key | shape | |
    |---|---|---|
    | activations | (B, d) float32 | A, where all rows have one |
    | other_activations | (B, d) float32 | A', likewise |
    | input_ids, attention_mask | (B, S) int64 | the contexts, right-padded |
    | other_input_ids, other_attention_mask | (B, S') int64 | where rows bring the context of A' in its place |
    | positions | (B,) int64 | P, the last index of each context |
    | rows | (B,) int64 | global row indices in the cache: the keys of sampling noise |
    | document | (B,) int64 | document hashes |
    | tail_ids, tail_mask | (B, T) int64, bool | the last T tokens of the context, P's included; left-padded |
    | given_text | (B,) bool | whether the tail is the first T of the row's own `text_ids` (`data.summaries`) |

    Raises:
        ValueError: if `num_text_tokens` is below 1 or `pad_token_id` is None.
    """

    pad_token_id: int
    num_text_tokens: int
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {self.num_text_tokens}")
        if self.pad_token_id is None:
            raise ValueError("pad_token_id must be a token id, got None; a tokenizer without one can pad with EOS")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        contexts = [np.asarray(row["input_ids"])[: row["position"] + 1] for row in rows]
        input_ids, attention_mask = self._padded(contexts)
        tail_ids = np.full((len(rows), self.num_text_tokens), self.pad_token_id, dtype=np.int64)
        tail_mask = np.zeros((len(rows), self.num_text_tokens), dtype=bool)
        given_text = np.zeros(len(rows), dtype=bool)
        for index, (row, context) in enumerate(zip(rows, contexts, strict=True)):
            given_text[index] = "text_ids" in row
            if given_text[index]:
                tail = row["text_ids"][: self.num_text_tokens]
            else:
                tail = context[int(context[0] == self.bos_token_id) :][-self.num_text_tokens :]
            start = self.num_text_tokens - len(tail)
            tail_ids[index, start:] = tail
            tail_mask[index, start:] = True
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": _stack(rows, "position", np.int64),
            "rows": _stack(rows, "row", np.int64),
            "document": _stack(rows, "document", np.int64),
            "tail_ids": torch.from_numpy(tail_ids),
            "tail_mask": torch.from_numpy(tail_mask),
            "given_text": torch.from_numpy(given_text),
        }
        for name in ("activation", "other_activation"):
            if all(name in row for row in rows):
                batch[f"{name}s"] = _stack(rows, name, np.float32)
        if "other_input_ids" in rows[0]:
            others = self._padded([row["other_input_ids"] for row in rows])
            batch |= dict(zip(("other_input_ids", "other_attention_mask"), others, strict=True))
        return batch

    def _padded(self, contexts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts as ids and mask (B, S), right-padded."""
        longest = max(len(context) for context in contexts)
        ids = np.full((len(contexts), longest), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(contexts), longest), dtype=np.int64)
        for index, context in enumerate(contexts):
            ids[index, : len(context)] = context
            mask[index, : len(context)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def _stack(rows: Sequence[dict[str, Any]], name: str, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.stack([row[name] for row in rows]).astype(dtype, copy=False))
