"""Training curves: what a run's log says of each step, and where its stages begin."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .run_folder import RunFolder

POINTS = 600  # of a curve; more cannot be seen

# (title, unit) -> name in the log -> what people read. The lines of one entry share a chart.
CHARTS: dict[tuple[str, str], dict[str, str]] = {
    ("held-out rows", "share: 1 is perfect, 0 the mean"): {
        "eval_fve": "FVE",
        "eval_kl_recovered": "KL recovered",
        "eval_shuffled_fve": "FVE, shuffled",
    },
    ("squared error of the reconstruction", "mean squares of the activations"): {
        "mse": "all texts",
        "mse_true_text": "true text",
        "mse_own_text": "the lens's own text",
    },
    ("cross-entropy of true text", "nats a token"): {"ce": "decoder"},
    ("KL", "nats"): {"kl": "subject's prediction, after Â", "lm": "text to its reference"},
    ("reward", ""): {"reward": "mean"},
    ("entropy of the text", "nats a token"): {"entropy": "decoder"},
    ("perplexity of the text", "over true text's"): {"eval_perplexity_ratio": "held-out rows"},
    ("learning rate", ""): {
        "learning_rate_decoder_base": "decoder",
        "learning_rate_decoder_lora": "decoder, LoRA",
        "learning_rate_encoder_base": "encoder",
        "learning_rate_encoder_lora": "encoder, LoRA",
    },
}


class Line(TypedDict):
    label: str
    points: list[list[float]]
    """[step, value]."""


class Curve(TypedDict):
    title: str
    unit: str
    """Empty where there is none."""
    lines: list[Line]


class Stage(TypedDict):
    label: str
    start: int
    """The step before its first."""


class Curves(TypedDict):
    charts: list[Curve]
    stages: list[Stage]


def curves(run: RunFolder) -> Curves | None:
    """The charts that a run's log has something for; None if it has nothing for any."""
    charts = []
    for (title, unit), names in CHARTS.items():
        lines = [Line(label=label, points=points_of(run.log, name)) for name, label in names.items()]
        lines = [line for line in lines if len(line["points"]) > 1]
        if lines:
            charts.append(Curve(title=title, unit=unit, lines=lines))
    return Curves(charts=charts, stages=stages(run)) if charts else None


def points_of(log: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Step and value where the log has one, thinned out to `POINTS`, the last one kept."""
    points = [[float(entry["step"]), float(entry[name])] for entry in log if is_point(entry, name)]
    stride = -(-len(points) // POINTS) or 1
    return points[(len(points) - 1) % stride :: stride]


def is_point(entry: Mapping[str, Any], name: str) -> bool:
    return isinstance(entry.get("step"), int | float) and isinstance(entry.get(name), int | float)


def stages(run: RunFolder) -> list[Stage]:
    """The stages in the log, named as the run's arguments name them."""
    names = [str(text).split()[0] for text in run.training.get("stages") or [] if str(text).split()]
    found: list[Stage] = []
    before, number = 0, 0
    for entry in run.log:
        if is_point(entry, "stage"):
            if int(entry["stage"]) != number:
                number = int(entry["stage"])
                label = names[number - 1] if 0 < number <= len(names) else f"stage {number}"
                found.append(Stage(label=label.replace("_", " "), start=before))
            before = int(entry["step"])
    return found
