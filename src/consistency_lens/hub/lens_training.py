"""How a lens was trained, as its card tells it: stages, settings, the log, and what it took."""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from .cards import NOT_MEASURED, NOT_RECORDED, count
from .emissions import Emissions
from .lens_folder import LensFolder, public
from .markdown import code, plain, table

LOG_ROWS = 12
# objective -> what it asks for, and the terms of its loss
OBJECTIVES = {
    "warm_start": ("decoder and encoder learn to write and to read the true end of the context", ("ce", "mse")),
    "gumbel": (
        "the decoder's own words, with straight-through gradients (Gumbel-softmax)",
        ("kl", "lm", "mse", "entropy"),
    ),
    "policy_gradient": (
        "texts that the encoder turns back better than others of their group gain (GRPO)",
        ("policy", "lm", "mse"),
    ),
}
# of an entry of the log -> its column, and decimals
LOSSES = {"loss": ("loss", 4)} | {
    name: (name, 4) for name in ("ce", "mse", "kl", "lm", "policy", "entropy", "policy_loss")
}
EVALUATIONS = {"eval_fve": ("FVE", 3), "eval_kl_recovered": ("KL recovered", 3), "eval_fve_nrm": ("of directions", 3)}


def stage_table(run: Mapping[str, Any]) -> str:
    """Objective, length, learning rate and weights of each stage."""
    training = run.get("training")
    if not training:
        return f"Stages: {NOT_RECORDED}."
    stages: list[str] = training["stages"]
    rates = of_stages(training["learning_rate_schedule"] or [training["lr_scheduler_type"]], len(stages))
    rows = []
    for number, (stage, rate) in enumerate(zip(stages, rates, strict=True)):
        objective, _, length = stage.partition(" ")
        asks, terms = OBJECTIVES.get(objective, ("", ()))
        weights = {term: of_stages(training[f"{term}_weight"], len(stages))[number] for term in terms}
        shown = ", ".join(f"{term} {weight}" for term, weight in weights.items() if str(weight) != "0")
        rows.append(
            (str(number + 1), f"{code(objective)}: {asks}" if asks else code(objective), _length(length),
             code(rate), code(shown) if shown else "")
        )  # fmt: skip
    return table(
        ("stage", "objective", "length", "learning rate schedule", "weights of the loss"), rows, numbers=False
    )


def _length(duration: str) -> str:
    """How long a stage was, in words: `500s`, `2e` or `60%` as the schedules have it."""
    if not duration:
        return "to the end"
    units = {"s": " steps", "e": " epochs", "%": "% of the steps"}
    return plain(duration[:-1] + units.get(duration[-1], duration[-1]))


def of_stages(values: Sequence[Any], stages: int) -> list[Any]:
    """What is given once for all stages or once for each, for each."""
    return list(islice(cycle(values), stages))


def training_facts(folder: LensFolder) -> list[tuple[str, str]]:
    """Label and value of what the training was and took."""
    run = folder.run
    training, laps, machine = run.get("training", {}), run.get("laps", {}), run.get("machine", {})
    own_rate = training.get("encoder_learning_rate")  # which may be 0
    encoder_rate = training.get("learning_rate") if own_rate is None else own_rate
    rates = f"decoder {training['learning_rate']:g}, encoder {encoder_rate:g}" if training else NOT_RECORDED
    seed = folder.provenance.get("seed", training.get("seed"))
    return [
        ("optimiser steps", _counted(run.get("steps"))),
        ("activations in a step", _counted(run.get("rows_per_step"))),
        ("learning rates", rates),
        ("optimiser", code(training["optim"]) if training else NOT_RECORDED),
        ("trained parameters", _counted(folder.provenance.get("trained_parameters"))),
        ("seed", NOT_RECORDED if seed is None else str(seed)),
        ("training took", minutes(laps.get("training"))),
        ("with corpus, activations and evaluation", minutes(run.get("seconds"))),
        ("machine", machine_name(machine)),
        ("emissions", emissions_text(folder.emissions)),
    ]


def _counted(number: int | None) -> str:
    return NOT_RECORDED if number is None else count(number)


def minutes(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def machine_name(machine: Mapping[str, Any]) -> str:
    """What a run ran on."""
    if not machine:
        return NOT_RECORDED
    processes = machine.get("processes", 1)
    if "gpu" in machine:
        return f"{processes} x {code(machine['gpu'])}"
    threads = f"{machine['threads']} thread{'s'[: machine['threads'] > 1]} of a CPU with {machine['cpu_cores']} cores"
    return threads if processes == 1 else f"{processes} processes of {threads}"


def emissions_text(emissions: Emissions | None) -> str:
    """Emissions and energy of a training."""
    if emissions is None:
        return NOT_MEASURED
    energy = "" if emissions.kwh is None else f", {emissions.kwh:.3g} kWh"
    runs = "" if emissions.runs == 1 else f", over {emissions.runs} runs"
    return f"{emissions.kg * 1000:.3g} g of CO2 equivalents{energy}{runs} (codecarbon)"


def settings(run: Mapping[str, Any]) -> str:
    """All arguments that are no defaults, one a line; paths from elsewhere by their last part."""
    given: dict[str, Any] | None = run.get("non_default")
    if given is None:
        return f"{NOT_RECORDED.capitalize()}."
    rows = [(code(name), code(_shown(value))) for name, value in sorted(given.items())]
    return table(("argument", "value"), rows, numbers=False) if rows else "None: all are the defaults."


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return public(value, None)
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return json.dumps(value)


def log_table(log: Sequence[Mapping[str, Any]]) -> str:
    """The training's losses at evenly spaced steps, the last one among them."""
    return _thinned([entry for entry in log if "loss" in entry], LOSSES) or f"{NOT_RECORDED.capitalize()}."


def evaluation_table(log: Sequence[Mapping[str, Any]]) -> str:
    """Figures of held-out rows during training, likewise; empty where none were measured."""
    return _thinned([entry for entry in log if "eval_fve" in entry], EVALUATIONS)


def _thinned(entries: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, int]]) -> str:
    if not entries:
        return ""
    last = len(entries) - 1
    picks = sorted({round(last * number / (LOG_ROWS - 1)) for number in range(LOG_ROWS)})
    there = {name: shown for name, shown in columns.items() if any(entry.get(name) is not None for entry in entries)}
    staged = any("stage" in entry for entry in entries)
    rows = []
    for entry in (entries[pick] for pick in picks):
        values = (_figure(entry.get(name), decimals) for name, (_, decimals) in there.items())
        rows.append((count(entry["step"]), *([str(entry.get("stage", ""))] if staged else []), *values))
    return table(("step", *(["stage"] if staged else []), *(label for label, _ in there.values())), rows)


def _figure(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
