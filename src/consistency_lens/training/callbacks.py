"""Callbacks of the trainer."""

import logging
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.row_order import TogetherSampler
from ..data.streaming import StreamSampler
from .nonfinite import NonfiniteGradientsError

logger = logging.getLogger(__name__)

EPOCH_ROUNDING = 1e-6  # the end of an epoch may be a little less than a whole number
SHOWN = ("stage", "ce", "policy", "kl", "lm", "mse", "skipped_steps")
EVALUATED = {
    "eval_fve": "FVE",
    "eval_shuffled_fve": "shuffled",
    "eval_kl_recovered": "KL recovered",
    "eval_perplexity_ratio": "perplexity ratio",
}


class OrderOfEpoch(TrainerCallback):
    """Tells a sampler of our own which epoch begins.

    `accelerate` tells it too, but not through the wrappers of a run that was resumed on several processes.

    Args:
        sampler: gives the sampler of the run under way; None before there is one.
    """

    def __init__(self, sampler: Callable[[], StreamSampler | TogetherSampler | None]) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sampler = self.sampler()
        if sampler is not None and state.epoch is not None:
            sampler.set_epoch(int(state.epoch + EPOCH_ROUNDING))


class LensProgress(ProgressCallback):
    """The trainer's progress bar: the loss terms stand at its end, and an evaluation has a line of its own."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            shown = {name: f"{logs[name]:.3g}" for name in SHOWN if logs.get(name)}
            self.training_bar.set_postfix(shown)
        if "eval_fve" in logs:
            figures = ", ".join(f"{label} {logs[name]:.3f}" for name, label in EVALUATED.items() if name in logs)
            self.training_bar.write(f"step {state.global_step}, held out: {figures}")


class SkipNonfiniteSteps(TrainerCallback):
    """Drops the update of a step whose gradients hold NaN or infinity, counts it, and stops a run that only does that.

    Without gradients the optimizer leaves parameters and moments as they are. The count is logged as `skipped_steps`.

    Args:
        limit: stop after this many skipped steps in a row.
        dropped: where the optimizer leaves such a step out by itself, and has already (DeepSpeed): whether it did.
    """

    def __init__(self, limit: int = 100, dropped: Callable[[], bool] | None = None):
        self.limit = limit
        self.dropped = dropped
        self.skipped = 0
        self.in_a_row = 0

    def state(self) -> dict[str, int]:
        """The counts, as JSON takes them."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        if not (self.dropped() if self.dropped else not gradients_are_finite(model)):
            self.in_a_row = 0
            return
        if self.dropped:
            lr_scheduler.step()  # the trainer leaves it out along with such a step, and schedules would part
        for parameter in model.parameters():
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        logger.warning("step %d skipped: its gradients are not finite (%d so far)", state.global_step, self.skipped)
        if self.in_a_row >= self.limit:
            raise NonfiniteGradientsError(
                f"{self.in_a_row} steps in a row had gradients that are not finite (last: step {state.global_step}); "
                "lower the learning rates or max_grad_norm, or train in float32"
            )


def gradients_are_finite(model: torch.nn.Module) -> bool:
    """Whether every gradient, on every process, is finite (one reduction and one host sync)."""
    gradients: list[Tensor] = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    if not gradients:
        return True
    norms = torch.stack([norm.float().to(gradients[0].device) for norm in torch._foreach_norm(gradients)])
    finite = torch.isfinite(norms).all().int()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
    return bool(finite)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which FSDP2 may have cut."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
