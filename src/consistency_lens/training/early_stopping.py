"""The end of a run whose evaluations no longer get better."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def evaluations_in_vain(values: Iterable[float], greater_is_better: bool, threshold: float) -> int:
    """How many of the last values, in a row, were not better by more than `threshold` than the best before them."""
    sign = 1 if greater_is_better else -1
    best, in_vain = -float("inf"), 0
    for value in values:
        # NaN is no better than anything
        if sign * value > best and (best == -float("inf") or sign * value - best > threshold):
            best, in_vain = sign * value, 0
        else:
            in_vain += 1
    return in_vain


class EarlyStopping(TrainerCallback):
    """Ends a run after `early_stopping_patience` evaluations in vain.

    It reads what was logged, which a checkpoint holds, so a resumed run stops where the undisturbed one does. Only the
    last stage counts: what one stage makes better the next may spoil, and `warm_start_patience` ends warm starts.

    Args:
        counts_from: gives the first step of the last stage.
    """

    def __init__(self, counts_from: Callable[[], int]) -> None:
        self.counts_from = counts_from

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        settings: Any = args
        name, first = figure_name(str(args.metric_for_best_model)), self.counts_from()
        values = [entry[name] for entry in state.log_history if name in entry and entry["step"] > first]
        in_vain = evaluations_in_vain(values, bool(args.greater_is_better), settings.early_stopping_threshold)
        if in_vain >= settings.early_stopping_patience:
            logger.warning("step %d: stopped, %d evaluations gave no better %s", state.global_step, in_vain, name)
            control.should_training_stop = True


def figure_name(metric: str) -> str:
    """The name under which a figure of an evaluation is logged."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"
