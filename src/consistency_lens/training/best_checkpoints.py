"""Which checkpoints of a run stay."""

from collections.abc import Collection, Mapping


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
