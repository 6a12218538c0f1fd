"""KPIs, gates and layers as rows of tables, for the terminal, cards and the README; nothing is printed here.

All are made from what is written, a `kpis` and an `acceptance` block and the layers of a run JSON, so that what is
read back shows the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.report import markdown_table
from .depth import DEPTHS
from .gates import (
    LEAST_DELTA_BITS,
    LEAST_SHARE_EARLIER,
    MOST_LAST_LAYER_BITS,
    REQUIREMENTS,
    WORST_DELTA_BITS,
)
from .held_out import BITS
from .kpis import (
    COVERAGE,
    DELTA,
    DELTA_CALIBRATED,
    EARLIER_BY,
    EARLIER_SHARE,
    EARLINESS,
    LAST_LAYER,
    RANKS,
)

KPI_COLUMNS = ("on the suite", "value", "95% interval", "asked for")
GATE_COLUMNS = ("gate", "asks for", "")
LAYER_COLUMNS = (
    "layer",
    "KL norm",
    "KL calibrated",
    "KL tuned",
    "cos norm",
    "cos tuned",
    "rank norm",
    "rank tuned",
    "top-1 norm",
    "top-1 tuned",
)
LAYER_CAPTION = (
    "KL(P_final ‖ P_layer) in bits, cosine of the logits with the final ones, rank of the answer: medians over the "
    "suite; top-1: share of answers on top"
)
NONE = "–"
LENSES = {"norm": "norm lens", "calibrated": "norm lens, calibrated", "tuned": "tuned lens"}


def kpi_rows(kpis: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """`KPI_COLUMNS` of each KPI in a `kpis` block."""
    layers = kpis["layers@{25,50,75}%"]
    rows = []
    for name, against in ((DELTA, "norm lens"), (DELTA_CALIBRATED, "calibrated norm lens")):
        for index, (depth, layer) in enumerate(zip(DEPTHS, layers, strict=True)):
            asked = f"A: ≥ {LEAST_DELTA_BITS[index]:g}, D: ≥ {WORST_DELTA_BITS:g}" if name == DELTA else ""
            label = f"bits of KL below the {against}'s at {depth} % depth (layer {layer})"
            rows.append((label, *_value(kpis, name, index), asked))
    for index, rank in enumerate(RANKS):
        rows.append((f"layers by which rank ≤ {rank} is reached earlier", *_value(kpis, EARLINESS, index), ""))
    for index, (rank, by) in enumerate(EARLIER_BY.items()):
        label = f"share of prompts with rank ≤ {rank} at least {by} layers earlier"
        rows.append((label, *_value(kpis, EARLIER_SHARE, index), f"B: ≥ {LEAST_SHARE_EARLIER:g}"))
    rows.append(("share of layers with the answer on top, less the norm lens's", *_value(kpis, COVERAGE), ""))
    label = f"bits between last layer and head (temperature {kpis['last_layer_temperature']:.2f})"
    return [*rows, (label, *_value(kpis, LAST_LAYER), f"C: ≤ {MOST_LAST_LAYER_BITS:g}")]


def gate_rows(acceptance: Mapping[str, bool]) -> list[tuple[str, str, str]]:
    """`GATE_COLUMNS` of each gate in an `acceptance` block."""
    verdicts = {True: "passed", False: "not passed"}
    return [(letter, asks, verdicts[acceptance[f"gate_{letter}"]]) for letter, asks in REQUIREMENTS.items()]


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """`LAYER_COLUMNS` of each layer of a run JSON; without a tuned lens its cells are empty."""
    return [
        (
            str(of["layer"]),
            *_both(of, "kl_from_final_bits", 2, between=(_number(of["calibrated_norm"]["kl_from_final_bits"], 2),)),
            *_both(of, "cos_to_final", 2),
            *_both(of, "answer_rank", 0),
            *_both(of, "share_of_answers_on_top", 2),
        )
        for of in layers
    ]


def kl_markdown(metrics: Mapping[str, Any]) -> str:
    """Held-out KL of every layer but the last, and the mean, in bits, from a fit's `metrics.json`."""
    kl, mean = metrics["kl"], metrics["mean_kl"]
    lenses = {name: label for name, label in LENSES.items() if name in kl}
    rows = [(str(layer), *(f"{kl[name][layer] * BITS:.3f}" for name in lenses)) for layer in range(len(kl["tuned"]))]
    rows.append(("mean", *(f"{mean[name] * BITS:.3f}" for name in lenses)))
    return markdown_table(("layer", *lenses.values()), rows)


def caption(kpis: Mapping[str, Any]) -> str:
    """What the KPIs were measured on."""
    return (
        f"{kpis['prompts']} prompts, {kpis['prompts_with_answer']} of them with an answer, {kpis['positions']:,} "
        "positions; intervals by bootstrap over prompts"
    )


def _value(kpis: Mapping[str, Any], name: str, index: int | None = None) -> tuple[str, str]:
    """A KPI and its interval."""
    value, interval = kpis[name], kpis["ci95"][name]
    if index is not None:
        value, interval = value[index], interval[index]
    if value is None:
        return NONE, ""
    return _number(value, 3), " to ".join(_number(end, 3) for end in interval)


def _both(of: Mapping[str, Any], name: str, decimals: int, between: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A figure of the norm lens and of the tuned lens."""
    tuned = _number(of["tuned"][name], decimals) if "tuned" in of else ""
    return (_number(of["norm"][name], decimals), *between, tuned)


def _number(value: float | None, decimals: int) -> str:
    if value is None:
        return NONE
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text
