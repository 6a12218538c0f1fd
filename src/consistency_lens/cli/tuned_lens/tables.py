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
    for heading in ("layer", "norm lens, bits", "norm lens, calibrated", "tuned lens", "less by"):
        table.add_column(heading, justify="right")
    kl = metrics["kl"]
    for layer, values in enumerate(zip(kl["norm"], kl["calibrated"], kl["tuned"], strict=True)):
        norm, calibrated, tuned = (value * BITS for value in values)
        table.add_row(str(layer), f"{norm:.3f}", f"{calibrated:.3f}", f"{tuned:.3f}", f"{1 - tuned / norm:.0%}")
    norm, calibrated, tuned = (metrics["mean_kl"][name] * BITS for name in ("norm", "calibrated", "tuned"))
    table.add_section()
    table.add_row("mean", f"{norm:.3f}", f"{calibrated:.3f}", f"{tuned:.3f}", f"{1 - tuned / norm:.0%}")
    return table
