"""Tables of tuned lenses for people."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def kl_table(metrics: Mapping[str, Any]) -> "Table":
    """Held-out KL of every layer, from `metrics.json`."""
    from rich.table import Table

    from ...tuned_lens.held_out import BITS

    table = Table(title=f"KL(P_final || P_layer) on held-out text, {metrics['positions']:,} positions")
    headings = {"norm": "norm lens, bits", "calibrated": "norm lens, calibrated", "tuned": "tuned lens"}
    lenses = [name for name in headings if name in metrics["kl"]]
    for heading in ("layer", *(headings[name] for name in lenses), "less by"):
        table.add_column(heading, justify="right")
    layers = [
        dict(zip(lenses, values, strict=True)) for values in zip(*(metrics["kl"][n] for n in lenses), strict=True)
    ]
    for label, values in [
        *((str(layer), values) for layer, values in enumerate(layers)),
        ("mean", metrics["mean_kl"]),
    ]:
        if label == "mean":
            table.add_section()
        less = round(1 - values["tuned"] / values["norm"], 2) + 0.0  # no -0%
        table.add_row(label, *(f"{values[name] * BITS:.3f}" for name in lenses), f"{less:.0%}")
    return table
