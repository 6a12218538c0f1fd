"""The early end of a warm start: when the reconstruction of held-out activations no longer gets better."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..cached_passes import evaluating
from ..evaluation.metrics import fve
from ..modeling_consistency_lens import ConsistencyLensModel

# Held-out activations that are read at each check, at most.
HELD_OUT_ROWS = 512


class WarmStartEnd(TrainerCallback):
    """Reads held-out activations every few steps of a warm start, and ends it after `patience` readings in vain.

    The lens reads them greedily and reconstructs them from its own words, for that is what the next stage starts from.
    The stages that follow begin at once; the run keeps its `max_steps`.

    Args:
        lens: without wrapper.
        warm_start_at: global step -> (index, first step) of the warm start that it lies in; None if in another stage.
        report: takes each reading.
        ended: called after a stage was ended.
        activations: held-out activations, (N, d).
        check_steps: optimizer steps between two readings.
        patience: readings without a better FVE, in a row.
        all_read: whether every process has to read, because none holds the lens by itself.

    Attributes:
        ends: stage index -> the step at which it was ended.
    """

    def __init__(
        self,
        lens: ConsistencyLensModel,
        activations: Tensor,
        warm_start_at: Callable[[int], tuple[int, int] | None],
        report: Callable[[float], None],
        ended: Callable[[], None],
        check_steps: int,
        patience: int,
        all_read: bool = False,
    ):
        self.lens = lens
        self.warm_start_at = warm_start_at
        self.report = report
        self.ended = ended
        self.activations = activations
        self.check_steps = check_steps
        self.patience = patience
        self.all_read = all_read
        self.start()

    def start(self) -> None:
        """Forgets all readings."""
        self.ends: dict[int, int] = {}
        self.stage = -1
        self.best = -float("inf")
        self.in_vain = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads if it is time to."""
        stage = self.warm_start_at(state.global_step - 1)
        if stage is None or (state.global_step - stage[1]) % self.check_steps != 0:
            return
        # one process decides for all: they must not part over the last bit of a float
        readings = [self.held_out_fve()] if self.all_read or state.is_world_process_zero else [0.0]
        if args.world_size > 1:
            broadcast_object_list(readings)
        self.update(stage[0], state.global_step, readings[0])
        self.report(readings[0])

    def update(self, stage: int, step: int, reading: float) -> None:
        """Takes a reading at a global step, and ends the stage there if it was one too many in vain."""
        if stage != self.stage:
            self.stage, self.best, self.in_vain = stage, -float("inf"), 0
        self.in_vain = 0 if reading > self.best else self.in_vain + 1
        self.best = max(self.best, reading)
        if self.in_vain >= self.patience:
            self.ends[stage] = step
            self.ended()

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know, as JSON takes it."""
        best = None if self.best == -float("inf") else self.best
        ends = {str(stage): step for stage, step in self.ends.items()}
        return {"ends": ends, "stage": self.stage, "best": best, "in_vain": self.in_vain}

    def load_state(self, state: dict[str, Any]) -> None:
        self.ends = {int(stage): step for stage, step in state["ends"].items()}
        self.best = -float("inf") if state["best"] is None else state["best"]
        self.stage, self.in_vain = state["stage"], state["in_vain"]

    @torch.no_grad()
    def held_out_fve(self) -> float:
        """FVE of the held-out activations, each reconstructed from its greedy text."""
        with evaluating(self.lens):
            parts = [
                self.lens.read_ids(self.lens.decode_ids(part.to(self.lens.device))).cpu()
                for part in self.activations.split(64)
            ]
        return float(fve(self.activations, torch.cat(parts), self.lens.mean.cpu()))
