"""What moves and how fast: groups, rates, unfreezing, averages, early stopping, and which checkpoints stay."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.states import checkpoints_in
from ..modeling_consistency_lens import ConsistencyLensModel
from ..schedules import parse_duration
from .arguments import ConsistencyLensTrainingArguments
from .best_checkpoints import remove_others, steps_to_keep
from .checkpointed_trainer import CheckpointedTrainer
from .control_arguments import GROUP_SETTINGS
from .early_stopping import EarlyStopping, figure_name
from .ema import Averages, check_averages
from .group_settings import of_group
from .learning_rates import GroupRates
from .parameter_groups import clip_groups, parameter_groups, trained_groups
from .tracking import DescribeMachine, TrackedRun, continue_in_wandb, identify_run, write_run
from .unfreezing import Unfreezing, parse_unfreeze

logger = logging.getLogger(__name__)

# Learning rates that transformers sets by what it sees, so that no group can have a warm-up of its own.
WATCHING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


class ControlledTrainer(CheckpointedTrainer):
    """The part of `ConsistencyLensTrainer` between its checkpoints and its losses.

    Attributes:
        averages: of the trained tensors, if asked for.
        rates: group -> learning rate of the last step.
        tracked_run: what trackers know the run by.
    """

    averages: Averages | None = None
    tracked_run: TrackedRun | None = None
    _resumed_from: Path | None = None

    def __init__(self, model: ConsistencyLensModel, args: ConsistencyLensTrainingArguments, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.lens = model
        self.rates: dict[str, float] = {}
        if args.ema_decay > 0:
            self.averages = Averages(model, args.ema_decay)
            self.add_callback(self.averages)
        if args.early_stopping_patience > 0:
            self.add_callback(EarlyStopping(lambda: self.timetable().bounds()[-1][0]))
        self.add_callback(DescribeMachine)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; True goes on from the newest checkpoint that is whole."""
        resume_from_checkpoint = self.checkpoint_named(resume_from_checkpoint)
        self._resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self.continue_tracking()
        if self.averages is not None:
            self.averages.start()
        trained = [parameter for parameter in self.lens.parameters() if parameter.requires_grad]
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)  # a group may have stood still to the end

    def continue_tracking(self) -> None:
        """Says in the run's folder what it is known by, and goes on with the same run in wandb."""
        self.tracked_run = identify_run(self.args.run_name, self._resumed_from)
        self.args.run_name = self.tracked_run.name
        if self.args.should_save:
            write_run(self.tracked_run, Path(str(self.args.output_dir)))
        if self.is_world_process_zero() and "wandb" in (self.args.report_to or ()):
            continue_in_wandb(self.tracked_run)

    # --- groups and their rates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group for each clone and kind, with own learning rates and weight decay."""
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            self.optimizer = optimizer_class(parameter_groups(opt_model, self.args), **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Rates by a schedule for each stage or by `lr_scheduler_type` for the whole run, and what unfreezing says."""
        if self.lr_scheduler is not None or not (self.args.learning_rate_schedule or self.args.unfreeze):
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.create_optimizer()
        factor: Callable[[int], float]
        if self.args.learning_rate_schedule:

            def factor(step: int) -> float:
                return self.timetable(num_training_steps).rate_factor(step)

        else:
            whole_run: Any = super().create_scheduler(num_training_steps, optimizer)
            factor = whole_run.lr_lambdas[0]
        unfreezing = self.unfreezing(num_training_steps)

        def factor_of(group: str) -> Callable[[int], float]:
            return lambda step: factor(step) * unfreezing.factor(group, step)

        self.lr_scheduler = GroupRates(optimizer, [factor_of(group["name"]) for group in optimizer.param_groups])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def refresh_rates(self) -> None:
        """Sets the rates of the next step anew, after the stages have moved."""
        if isinstance(self.lr_scheduler, GroupRates):
            self.lr_scheduler.refresh()

    def unfreezing(self, total_steps: int) -> Unfreezing:
        """When each group begins to train."""
        return Unfreezing.resolve(self.args.unfreeze or [], self.timetable(total_steps).steps_per_epoch, total_steps)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A forward and a backward pass that leave groups without gradients which are not yet to move.

        So neither the clipping nor the optimizer sees them: no moments are gathered, and nothing decays. Several
        processes have to reduce all gradients in every step; a single one does not even compute those.
        """
        groups = self.create_optimizer().param_groups
        self.rates = {group["name"]: float(group["lr"]) for group in groups}
        if not self.args.unfreeze:
            return super().training_step(*args, **kwargs)
        unfreezing, step = self.unfreezing(self.state.max_steps), self.state.global_step
        alone = self.args.world_size == 1 and not self.weights.spread
        frozen = []
        for group in groups:
            is_frozen = unfreezing.is_frozen(group["name"], step)
            for parameter in group["params"]:
                if alone:
                    parameter.requires_grad_(not is_frozen)
                if is_frozen:
                    frozen.append(parameter)
        loss = super().training_step(*args, **kwargs)
        for parameter in frozen:
            parameter.grad = None
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        limits = self.args.of_groups("group_max_grad_norm")
        if not limits:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_groups(self.create_optimizer().param_groups, limits, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.args.group_max_grad_norm:  # max_grad_norm is off, those of groups are not
            grad_norm = self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    # --- averages

    def averaged(self) -> AbstractContextManager[None]:
        """The lens as it is to be judged: with the averages in it, where there are any."""
        return nullcontext() if self.averages is None else self.averages.in_place()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            if self.averages is not None:
                self.averages.save(Path(output_dir))
            if self.tracked_run is not None:
                write_run(self.tracked_run, Path(output_dir))

    def _load_optimizer_and_scheduler(self, resume: str | None) -> None:
        super()._load_optimizer_and_scheduler(resume)
        if resume is not None:
            check_averages(Path(resume), self.averages is not None)
            if self.averages is not None:
                self.averages.load(Path(resume))

    # --- the best checkpoints

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        metric = self.args.metric_for_best_model
        if metric is not None and figure_name(metric) not in metrics:
            known = ", ".join(sorted(name.removeprefix("eval_") for name in metrics if name.startswith("eval_")))
            raise ValueError(f"metric_for_best_model: no evaluation gives {metric!r}; it is one of {known}")
        is_best = super()._determine_best_metric(metrics, trial)
        # with save_strategy=best this decides on the checkpoint, though a run that is asked to go needs one
        return is_best or self.control.should_save

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        logger.info("loading the best lens, %s: %s", best, self.state.best_metric)
        super()._load_best_model()
        if self.averages is not None:
            self.averages.load(best)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.no_rotation():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.remove_checkpoints()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with self.no_rotation():
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def no_rotation(self) -> Iterator[None]:
        """Keeps transformers from removing checkpoints, for it knows the last ones and a single best one alone."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def remove_checkpoints(self) -> None:
        """Removes the checkpoints that `save_total_limit` and `keep_best` do not keep.

        The one that was just written stays, and the one that the run went on from, and the best where it is to be
        loaded at the end.
        """
        folder, name = Path(str(self.args.output_dir)), figure_name(str(self.args.metric_for_best_model))
        present = checkpoints_in(folder)
        here = {step for step in present if step <= self.state.global_step}
        figures = {int(entry["step"]): entry[name] for entry in self.state.log_history if name in entry}
        keep = steps_to_keep(
            here, figures, bool(self.args.greater_is_better), self.args.keep_best, self.args.save_total_limit
        )
        protected = [self._resumed_from]
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            protected.append(Path(self.state.best_model_checkpoint))
        resolved = {path.resolve() for path in protected if path is not None}
        keep |= {step for step, path in present.items() if path.resolve() in resolved}
        remove_others(folder, keep, self.state.global_step)


def check_control(lens: ConsistencyLensModel, args: ConsistencyLensTrainingArguments) -> None:
    """Checks that what is said of parameter groups fits the lens.

    Raises:
        ValueError: for a group that the lens does not train, or if none trains from the start.
    """
    groups = trained_groups(lens)
    named = {name: list(args.of_groups(name)) for name in GROUP_SETTINGS}
    unfreeze = parse_unfreeze(args.unfreeze or [])
    for setting, settings in {**named, "unfreeze": list(unfreeze)}.items():
        for wanted in settings:
            if not any(of_group({wanted: True}, group) for group in groups):
                raise ValueError(f"{setting}: this lens trains no {wanted}; it trains {', '.join(groups)}")
    late = [group for group in groups if (found := of_group(unfreeze, group)) and is_late(found.start)]
    if len(late) == len(groups):
        raise ValueError(f"unfreeze: nothing would train at first; leave one of {', '.join(groups)} out")
    if args.unfreeze and not args.learning_rate_schedule and args.lr_scheduler_type in WATCHING_SCHEDULERS:
        raise ValueError(
            f"unfreeze: lr_scheduler_type {args.lr_scheduler_type} sets all rates by what it sees; take another"
        )


def is_late(start: str) -> bool:
    """Whether a duration is longer than nothing, in a run of any length."""
    return parse_duration(start, steps_per_epoch=10**9, total_steps=10**9) > 0
