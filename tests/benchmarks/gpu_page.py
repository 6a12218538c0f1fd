"""The page of what was measured on GPUs, written from the results that lie beside each other."""

import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "shape", "clones", "objective", "mode", "strategy", "processes", "B", "step, s", "activations/s", "peak, GB",
    "useful TFLOP", "MFU", "the plan's B", "the plan's activations/s", "ratio",
)  # fmt: skip
COMPARED = ("benchmark", "what", "ours, s", "theirs, s", "ratio")
BEGINNING = (
    "# Measured on GPUs",
    "Written by `make bench-gpu` (`tests/benchmarks/gpu_step.py`, `cache_vs_bare_forward.py`) from what it measured.",
)
END = (
    "Weights are random, the subject is bfloat16, and a step is one of `ConsistencyLensTrainer` under bfloat16 "
    "autocast, without the wait for the loader. Medians. B: activations of a step on each device; four texts an "
    "activation under policy gradient. In place: eager, with one buffer of keys and values for the tokens of a text "
    "(`LensDecoder.attends_in_place`). Useful TFLOP: 10^12 FLOPs of the matrix products that a device's step cannot "
    "do without, forward and backward; what is made twice, such as a drawn text that is then scored, padding and "
    "prompts do not count (`tests/benchmarks/step_flops.py` has the count). MFU: these over the step's seconds "
    "times the device's dense bfloat16 peak. The plan's step (`spec_reference.py`), with adapters where ours has "
    "them, ran in turn with ours, with as many activations or half of them, a quarter and so on until they fit; the "
    "ratio is of activations a second."
)


def write_page(results: Path, page: Path, newest: dict[str, Any]) -> str:
    """Writes the page of all results of a folder; returns the line that `newest` has in it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document([json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]), "utf-8")
    return row_of(newest)


def document(results: list[dict[str, Any]]) -> str:
    """The page, with tables for each device and its versions."""
    parts = list(BEGINNING)
    places = {json.dumps([result["machine"], result["versions"]]): result for result in results}
    for place, first in places.items():
        here = [result for result in results if json.dumps([result["machine"], result["versions"]]) == place]
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        parts += [f"## {first['machine']['device']}", f"{versions}."]
        steps = [result for result in here if "settings" in result]
        compared = [result for result in here if "settings" not in result and result["unit"] == "seconds"]
        sizes = {f"S={of['S']}, T={of['T']}, K={of['K']}" for of in (result["settings"] for result in steps)}
        if sizes:
            parts.append(f"{'; '.join(sorted(sizes))}.")
        for columns, rows in ((COLUMNS, steps), (COMPARED, compared)):
            if rows:
                lines = [columns, ["---"] * len(columns)]
                parts.append("\n".join([f"| {' | '.join(line)} |" for line in lines] + [row_of(row) for row in rows]))
    return "\n\n".join([*parts, END]) + "\n"


def row_of(result: dict[str, Any]) -> str:
    """A result as a line of a Markdown table."""
    cells = step_cells(result) if "settings" in result else compared_cells(result)
    return f"| {' | '.join(map(str, cells))} |"


def step_cells(result: dict[str, Any]) -> list[str]:
    settings, mfu, plan = result["settings"], result["mfu"], result.get("plan")
    cells = [settings[name] for name in ("shape", "clones", "objective", "mode", "strategy", "processes", "batch")]
    cells += [f"{result['seconds']:.3g}", f"{result['activations_per_second']:,.0f}"]
    cells += [f"{result['peak_memory_bytes'] / 1e9:.1f}", f"{result['useful_flops'] / 1e12:.3g}"]
    cells.append("not known" if mfu is None else f"{mfu:.1%}")
    if plan is None:
        return [*cells, "", "", ""]
    return [*cells, plan["batch"], f"{plan['activations_per_second']:,.0f}", f"{plan['ratio']:.2f}"]


def compared_cells(result: dict[str, Any]) -> list[str]:
    seconds = [f"{result[side]:.3g}" for side in ("ours", "theirs")]
    return [f"`{result['name']}`", result["what"], *seconds, f"{result['ratio']:.2f}"]
