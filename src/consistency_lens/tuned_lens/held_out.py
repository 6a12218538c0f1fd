"""How close each layer's distribution is to the final one on held-out text, for the tuned lens and the norm lens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .depth import DEPTHS, layer_at_depth
from .modeling_tuned_lens import SEED, TunedLens
from .residual_batches import read_batch, sampled_positions
from .streamed_kl import Head, streamed_kl

BITS = 1 / math.log(2)
TUNED, NORM, CALIBRATED = LENSES = ("tuned", "norm", "calibrated")
# positions of each held-out block, where not all are asked for
EVAL_POSITIONS = 64


class HeldOutKL(NamedTuple):
    """Sums over held-out positions, which processes may add up."""

    sums: Mapping[str, Tensor]
    """Lens -> KL(P_final || P_layer) in nats summed over positions, (layers,)."""
    layers: Sequence[int]
    positions: int

    @property
    def means(self) -> dict[str, Tensor]:
        """Lens -> mean KL in nats, (layers,)."""
        return {name: total / self.positions for name, total in self.sums.items()}

    def metrics(self) -> dict[str, Any]:
        """Figures of a whole evaluation for `metrics.json`, in nats where it does not say bits."""
        means = {name: values.tolist() for name, values in self.means.items()}
        depths = [layer_at_depth(percent, len(self.layers) + 1) for percent in DEPTHS]
        return {
            "kl": means,
            "mean_kl": {name: sum(values) / len(values) for name, values in means.items()},
            "layers@{25,50,75}%": depths,
            "val_kl_bits@{25,50,75}%": [means["tuned"][layer] * BITS for layer in depths],
            "val_norm_kl_bits@{25,50,75}%": [means["norm"][layer] * BITS for layer in depths],
            "positions": self.positions,
        }


@torch.no_grad()
def held_out_kl(
    lens: TunedLens,
    head: Head,
    blocks: np.ndarray,
    rows: Sequence[int],
    bounds: tuple[int, int],
    layers: Sequence[int] | None = None,
    lenses: Sequence[str] = LENSES,
    positions: int | None = EVAL_POSITIONS,
    batch_size: int = 8,
    seed: int = SEED,
    progress: bool = False,
) -> HeldOutKL:
    """Reads held-out blocks with some lenses.

    Args:
        blocks: tokens, (N, S).
        rows: which of them.
        bounds: of the positions, see `position_bounds`.
        layers: None for all but the last.
        lenses: of LENSES; "calibrated" is the norm lens, divided by temperatures of its own.
        positions: of each block, drawn from the seed; None for all.
    """
    layers = range(lens.num_layers - 1) if layers is None else layers
    device = lens.readout.device
    temperatures = {
        "tuned": torch.stack([lens.temperature(layer) for layer in layers]).to(device),
        "norm": torch.ones(len(layers), device=device),
        "calibrated": lens.norm_temperature[list(layers)].to(device),
    }
    sums = {name: torch.zeros(len(layers), dtype=torch.float64, device=device) for name in lenses}
    count = 0
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for batch_rows in tqdm(batches, desc="held-out text", unit=" batches", disable=not progress):
        input_ids = torch.from_numpy(blocks[list(batch_rows)].astype(np.int64))
        batch = read_batch(lens, head, input_ids, sampled_positions(batch_rows, positions, bounds, seed), layers)
        count += batch.hidden.shape[1]
        plain = batch.hidden
        if lens.config.translator_place == "before_norm":
            plain = lens.readout.normalise(plain)
        for name in lenses:
            if name == "tuned":
                pairs = zip(layers, batch.hidden, strict=True)
                hidden = torch.stack([lens.translate(layer, hidden) for layer, hidden in pairs])
            else:
                hidden = plain
            sums[name] += streamed_kl(hidden, temperatures[name], batch.teacher, head).sum(dim=1)
    return HeldOutKL(sums, list(layers), count)
