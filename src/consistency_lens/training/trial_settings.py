"""Settings that only show whether they will do when they are tried: before the long work, and not behind it."""

from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..modeling_consistency_lens import ConsistencyLensModel
from .arguments import ConsistencyLensTrainingArguments

STEPS = 10


def check_trial_settings(lens: ConsistencyLensModel, args: ConsistencyLensTrainingArguments) -> None:
    """Makes what reports, the optimizer's arguments and a scheduler as the trainer will, and forgets them.

    Raises:
        ValueError: for a tracker, an optimizer or a schedule that is not to be had with these settings.
    """
    trials = {
        "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(args.report_to)],
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(args, lens),
        "lr_scheduler_type": lambda: make_scheduler(args),
    }
    for name, trial in trials.items():
        try:
            trial()
        except Exception as error:  # each package raises its own kinds
            cause = " ".join(str(error).split()) or type(error).__name__
            got = str(getattr(args, name))
            raise ValueError(f"{name}: got {got}, which cannot be had ({cause}); set another") from error


def make_scheduler(args: ConsistencyLensTrainingArguments) -> Any:
    """A scheduler of the kind that is asked for, over nothing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings: Any = args.lr_scheduler_kwargs or None
    return get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(STEPS), STEPS, settings)
