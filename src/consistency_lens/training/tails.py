"""The tails of contexts as texts: what the decoder learns to write in warm start, and the encoder to read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tails(NamedTuple):
    """The tails of a batch as texts, which begin at index 0: `ids` (B, T), `mask` (B, T) true at what the decoder
    predicts, a stop token included, and `read_mask` (B, T) true at what the encoder reads."""

    ids: Tensor
    mask: Tensor
    read_mask: Tensor

    @classmethod
    def of(cls, batch: dict[str, Any], limits: Tensor, stop_token_id: int | None) -> "Tails":
        """The last `limits` (B,) tokens of each tail. Without a stop token the decoder still predicts the whole tail,
        for its texts always have T tokens."""
        tail_ids, available = batch["tail_ids"], batch["tail_mask"].sum(dim=1)
        kept = available if stop_token_id is None else available.minimum(limits)
        index = torch.arange(tail_ids.shape[1], device=tail_ids.device)
        ids = tail_ids.gather(1, (index + (len(index) - kept)[:, None]).clamp(max=len(index) - 1))
        mask = index < kept[:, None]
        if stop_token_id is None:
            return cls(ids, mask, last_true(mask, limits))
        return cls(ids.masked_fill(index == kept[:, None], stop_token_id), index <= kept[:, None], mask)


def last_true(mask: Tensor, count: Tensor) -> Tensor:
    """Keeps the last `count` (B,) true places of each row of a mask (B, T)."""
    from_end = mask.flip(1).cumsum(dim=1).flip(1)
    return mask & (from_end <= count[:, None])
