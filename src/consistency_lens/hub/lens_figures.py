"""The figures of a lens as its card shows them, and as the `model-index` in its head: what is missing says so."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.arguments import CHECKS
from ..evaluation.controls import CONTROLS
from ..evaluation.report import (
    CONTROL_COLUMNS,
    METRIC_COLUMNS,
    METRICS,
    caption,
    check_tables,
    control_label,
    metric_rows,
)
from .cards import NOT_MEASURED
from .markdown import plain, table

OWN = "the lens's words"
# the controls that say at once what a figure is worth
AT_A_GLANCE = {
    "context_tail": "the true last {tokens} tokens of the context instead",
    "current_token_only": "the current token alone",
    "shuffled": "the lens's words for another row",
    "mean": "no words: the mean activation",
}
CHECK_NAMES = {
    "private_code": "whether another reader understands the words",
    "best_of_n": "the best of n texts",
    "linear_probe": "a linear probe",
    "text_length": "parts of the text",
    "ablation": "the words left out one by one",
    "steering": "edit and steer",
}


def glance(metrics: Mapping[str, Any], num_text_tokens: int) -> str:
    """FVE and KL recovered, with intervals, beside the controls that matter most."""
    controls = metrics.get("controls", {})
    rows = [
        (f"**{OWN}**", *(f"**{_value(metrics, name)}**{_span(metrics, name)}" for name in ("fve", "kl_recovered")))
    ]
    for name, label in AT_A_GLANCE.items():
        of = controls.get(name, {})
        rows.append((label.format(tokens=num_text_tokens), *(_value(of, key) for key in ("fve", "kl_recovered"))))
    return table(CONTROL_COLUMNS, rows)


def all_figures(metrics: Mapping[str, Any]) -> str:
    """Every metric with its interval, every control, and the checks that were run; the others by name."""
    there = {name: value for name, value in metrics.items() if value is not None}
    measured = {label: (value, span) for label, value, span in metric_rows({"ci95": {}} | there)}
    rows = [(label, *measured.get(label, (NOT_MEASURED, ""))) for label, _ in METRICS.values()]
    controls = metrics.get("controls", {})
    beside = [(OWN, *(_value(metrics, key) for key in ("fve", "kl_recovered")))]
    for name in [*CONTROLS, *(name for name in controls if name not in CONTROLS)]:
        of = controls.get(name, {})
        beside.append((plain(control_label(name, of)), *(_value(of, key) for key in ("fve", "kl_recovered"))))
    parts = [table(METRIC_COLUMNS, rows), table(CONTROL_COLUMNS, beside)]
    if metrics:
        parts.append(f"{caption(metrics)}.")
    for check in check_tables(metrics):
        cells = [[plain(cell) for cell in row] for row in check.rows]
        parts += [f"{check.title}:", table([plain(name) for name in check.columns], cells)]
    missing = [CHECK_NAMES.get(name, name) for name in CHECKS if name not in metrics]
    if missing:
        parts.append(f"Checks {NOT_MEASURED}: {', '.join(missing)}.")
    return "\n\n".join(parts)


def eval_results(
    metrics: Mapping[str, Any], task: str, dataset: str, dataset_on_hub: bool, revision: str | None
) -> list[EvalResult]:
    """The figures for `model-index`; controls have names of their own, so that none is taken for the lens's.

    Args:
        task: `pipeline_tag`.
        dataset: that the held-out rows are of.
        dataset_on_hub: whether it is a repository's id.
        revision: of the data set.
    """
    about: dict[str, Any] = {
        "task_type": task,
        "task_name": "explanation of activations, and reconstruction from the words",
        "dataset_type": dataset if dataset_on_hub else "text",
        "dataset_name": f"{dataset}, held-out documents",
        "dataset_revision": revision,
    }
    size = {name: metrics[name] for name in ("rows", "documents") if name in metrics}
    intervals = metrics.get("ci95", {})

    def result(key: str, label: str, value: float, arguments: dict[str, Any]) -> EvalResult:
        arguments = arguments | ({"ci95": list(intervals[key])} if key in intervals else {})
        return EvalResult(
            metric_type=key, metric_value=value, metric_name=label, metric_args=arguments or None, **about
        )

    own = [
        result(name, label, metrics[name], size)
        for name, (label, _) in METRICS.items()
        if _is_number(metrics.get(name))
    ]
    controls = [
        result(f"controls.{control}.{name}", f"{METRICS[name][0]} of the control {control}", of[name], {})
        for control, of in metrics.get("controls", {}).items()
        for name in ("fve", "kl_recovered")
        if _is_number(of.get(name))
    ]
    return own + controls


def _value(of: Mapping[str, Any], name: str) -> str:
    value = of.get(name)
    return f"{value:.{METRICS[name][1]}f}" if _is_number(value) else NOT_MEASURED


def _span(metrics: Mapping[str, Any], name: str) -> str:
    ends = metrics.get("ci95", {}).get(name)
    return "" if ends is None else f" ({' to '.join(f'{end:.{METRICS[name][1]}f}' for end in ends)})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
