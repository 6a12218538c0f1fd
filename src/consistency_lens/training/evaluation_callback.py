"""The evaluation of a lens while it is trained."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation.evaluated import NotFiniteError
from ..evaluation.evaluator import Evaluator
from .early_stopping import figure_name
from .trainer import ConsistencyLensTrainer

logger = logging.getLogger(__name__)

# What the trainer measures itself, or what says nothing of the lens.
LEFT_OUT = ("rows", "documents", "seconds", "samples_per_second")


class EvaluateLens(TrainerCallback):
    """Runs an evaluator whenever the trainer evaluates, as `eval_strategy` says.

    Its figures are logged as `eval_fve`, `eval_kl_recovered`, `eval_shuffled_fve`, ..., and join those that
    `Trainer.evaluate` returns, so `metric_for_best_model: fve`, `load_best_model_at_end` and early stopping know them.

    Args:
        trainer: whose lens the evaluator measures.
        evaluator: over held-out rows; a few hundred of them and few controls keep it short.
    """

    def __init__(self, trainer: ConsistencyLensTrainer, evaluator: Evaluator) -> None:
        self.trainer = trainer
        self.evaluator = evaluator

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics is None:
            return
        # One process measures (where none holds the lens by itself, all have to) and tells the others, so that all
        # agree on which checkpoint is the best.
        measures = state.is_world_process_zero or self.trainer.weights.spread
        figures = [self.figures(state.global_step) if measures else {}]
        if args.world_size > 1:
            broadcast_object_list(figures)
        metrics.update(figures[0])
        self.trainer.log(dict(figures[0]))

    def figures(self, step: int) -> dict[str, float]:
        """What the evaluator finds, by the names of the log; the worst of all where the lens is not finite."""
        try:
            return logged(self.evaluator())
        except NotFiniteError as error:
            # The trainer skips steps that are not finite and stops when there is nothing else; such a lens is no best.
            logger.warning("step %d: not evaluated: %s", step, error)
            args = self.trainer.args
            worst = {"eval_fve": -math.inf, "eval_kl_recovered": -math.inf}
            if args.metric_for_best_model is not None:
                worst[figure_name(args.metric_for_best_model)] = -math.inf if args.greater_is_better else math.inf
            return worst


def logged(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of metrics, and of each control but the mean, where all are 0, under the trainer's names."""
    values = {name: value for name, value in metrics.items() if isinstance(value, float) and name not in LEFT_OUT}
    for control, of_control in metrics["controls"].items():
        if control != "mean":
            values |= {f"{control}_{name}": value for name, value in of_control.items()}
    return {f"eval_{name}": value for name, value in values.items()}
