"""Which checkpoints of a run stay."""

import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ..checkpoints.states import checkpoints_in

LEAVING = "leaving-"  # no name that a run resumes from


def steps_to_keep(
    steps: Collection[int], figures: Mapping[int, float], greater_is_better: bool, best: int, last: int | None
) -> set[int]:
    """The checkpoints that stay: the `best` with the best figures, and the `last`.

    Args:
        steps: of the checkpoints that there are.
        figures: step -> what was measured there; a checkpoint without a figure, or with NaN, is no best one.
        greater_is_better: whether figures grow as the lens gets better.
        best: 0 keeps none for its figure.
        last: None keeps all, unless `best` is given: then the last one.
    """
    ordered = sorted(steps)
    if last is None:
        last = 1 if best else len(ordered)
    sign = 1 if greater_is_better else -1
    measured = [step for step in ordered if step in figures and figures[step] == figures[step]]
    # of two that are equal, the earlier: no later one has shown to be better
    by_figure = sorted(measured, key=lambda step: (-sign * figures[step], step))
    return set(by_figure[:best]) | set(ordered[-max(last, 1) :])


def remove_others(folder: Path, keep: Iterable[int], up_to: int) -> None:
    """Removes a run's checkpoints of steps up to `up_to`, but those to keep; later ones are of another attempt.

    A checkpoint loses its name first: one that is half deleted would be taken for a whole one.
    """
    keep = set(keep)
    for step, checkpoint in checkpoints_in(folder).items():
        if step <= up_to and step not in keep:
            checkpoint.rename(folder / f"{LEAVING}{checkpoint.name}")
    for path in folder.glob(f"{LEAVING}checkpoint-*"):
        shutil.rmtree(path)
