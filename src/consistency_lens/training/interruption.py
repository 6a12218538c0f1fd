"""SIGTERM and SIGUSR1: a run that is asked to go saves where it is, says so in `interrupted.json`, and ends well.

That is what a cluster sends before it takes a machine away; the job that is started again goes on from there.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic_write import write_json

logger = logging.getLogger(__name__)

INTERRUPTED_FILE = "interrupted.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A launcher hands on a signal that the cluster has sent to every process already; that one is not a second.
ONE_SIGNAL_SECONDS = 5.0


class RunInterrupted(KeyboardInterrupt):
    """Raised by a run that was asked to go. No `Exception`, so that nothing in between takes it for a failure.

    Args:
        signal_name: "SIGTERM" or "SIGUSR1".
        step: optimizer steps that are done.
        checkpoint: the folder that was saved; None if there was nothing to save, or no time.
    """

    def __init__(self, signal_name: str, step: int, checkpoint: str | None) -> None:
        self.signal_name, self.step, self.checkpoint = signal_name, step, checkpoint
        super().__init__(self.message())

    def message(self) -> str:
        """One line for the user."""
        if self.checkpoint is not None:
            return (
                f"interrupted by {self.signal_name} at step {self.step}; go on with "
                f"--resume_from_checkpoint {self.checkpoint}"
            )
        return f"interrupted by {self.signal_name} outside the training; go on with --resume_from_checkpoint auto"


class Interruption(TrainerCallback):
    """Ends a run when a signal comes: at the end of a step while it trains, and at once before and after that.

    All processes agree at the end of each step, so that they save at the same one, though the signal may reach them
    in different steps, or only one of them. An evaluation that is due at that step comes first, as it could not be
    made up for. A second signal, five seconds or more after the first, ends the process as if nothing handled it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0
        self.training = False
        self.due = False
        self.stopping = False
        self.process = os.getpid()
        self.group: Any = None
        self.step = 0
        self.saved = 0
        self.checkpoint: str | None = None

    def handle(self, number: int, _frame: Any) -> None:
        """The handler of the signals."""
        if os.getpid() != self.process or self.is_second():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received, self.received_at = number, time.monotonic()
            if not self.training:
                raise self.error()

    def is_second(self) -> bool:
        """Whether a signal that comes now is not the first over again."""
        return self.received is not None and time.monotonic() - self.received_at >= ONE_SIGNAL_SECONDS

    def error(self) -> RunInterrupted:
        """What the run ends with."""
        return RunInterrupted(signal.Signals(self.received or SIGNALS[0]).name, self.step, self.checkpoint)

    def agreed(self, args: TrainingArguments) -> bool:
        """Whether any process has received a signal; the same answer in all of them."""
        received = self.received or 0
        if args.world_size > 1:
            # on the host, so that the device need not catch up
            greatest = torch.tensor(received)
            torch.distributed.all_reduce(greatest, op=torch.distributed.ReduceOp.MAX, group=self.group)
            received = int(greatest)
        if received:
            self.received = received
        return received > 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")
        self.training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.due = self.agreed(args)
        if self.due and not ends_epoch(state):
            self.stop(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpoint is not None:
            # the epoch is cut short; what belongs to its end is for the run that goes on
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.due or (self.saved != state.global_step and self.agreed(args)):
            # the signal may have come in an evaluation behind the last step of all
            self.stop(args, control)

    def stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Asks for a checkpoint that the run can go on from, and to stop when it is there."""
        self.stopping = control.should_save = True
        args.save_only_model = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved = state.global_step
        # only now, for the checkpoint keeps what it says of stopping
        if self.stopping and not control.should_training_stop:
            control.should_training_stop = True
            self.step = state.global_step
            self.checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            # else `Trainer` loads the best one at the end, and with save_total_limit=1 removes this one
            state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        self.step = state.global_step

    def raise_if_received(self) -> None:
        """To be called when the training has returned.

        Raises:
            RunInterrupted: if a signal came meanwhile.
        """
        if self.received is not None:
            raise self.error()


@dataclass(frozen=True)
class UndisturbedWorker:
    """What a worker of a data loader begins with: signals that reach all processes are for the one that trains.

    Attributes:
        then: what the loader wanted it to begin with, if anything.
    """

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


def ends_epoch(state: TrainerState) -> bool:
    """Whether the step that has just ended is the last of its epoch."""
    return state.epoch is not None and state.epoch == int(state.epoch)


def interrupted_file(args: TrainingArguments) -> Path:
    """Where a run says that it was asked to go; asked for late, as a run without a folder is given one."""
    return Path(str(args.output_dir)) / INTERRUPTED_FILE


@contextmanager
def interruptible(args: TrainingArguments) -> Iterator[Interruption]:
    """A run that ends well when it is asked to go; its trainer needs the callback.

    Raises:
        ValueError: if `transformers` was asked to do the same.
        RunInterrupted: when a signal came; `interrupted.json` in the run's folder tells the same. A run that comes to
            its end removes the file.
    """
    if args.enable_jit_checkpoint:
        raise ValueError("enable_jit_checkpoint: a run saves at SIGTERM without it; set it to false")
    interruption = Interruption()
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for asked in SIGNALS:
                before[asked] = signal.signal(asked, interruption.handle)
        yield interruption
        if args.process_index == 0:
            interrupted_file(args).unlink(missing_ok=True)
    except RunInterrupted as error:
        if args.process_index == 0:
            content = {"step": error.step, "signal": error.signal_name, "checkpoint": error.checkpoint}
            write_json(interrupted_file(args), content)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
