"""A trainer whose checkpoints are whole or do not count, and that goes on from them as if never disturbed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerControl

from ..atomic_write import write_json
from . import states
from .manifest import MANIFEST_FILE, wait_for_everyone, write_manifest
from .resuming import checkpoint_to_resume

logger = logging.getLogger(__name__)

SCALER_FILE = "scaler.json"


class WholeCheckpointTrainer(Trainer):
    """What all trainers here do alike with checkpoints.

    A subclass says what model, optimizer and random states are (`_save`, `_save_optimizer_and_scheduler`,
    `_save_rng_state` and what loads them); nothing of it may be pickled.

    Attributes:
        how_to_go_on: what the user does after a checkpoint could not be written.
    """

    how_to_go_on = "go on with --resume_from_checkpoint true"
    _stopped_early = False

    # --- saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        try:
            self.make_way(folder)
            super()._save_checkpoint(model, trial)
            write_manifest(folder, self.args)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)  # it takes room, and is not whole
            raise states.CheckpointWriteError(
                f"checkpoint: cannot write {str(folder)!r}: {error.strerror or error}; those before it are whole: "
                f"make room and {self.how_to_go_on}"
            ) from error
        if self.args.should_save:
            states.remove_torn(run, up_to=self.state.global_step)

    def make_way(self, folder: Path) -> None:
        """Removes what a killed run left under the name of a checkpoint that is to be written."""
        if self.args.should_save and folder.is_dir():
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder)
        wait_for_everyone(self.args)

    def num_training_rows(self) -> int | None:
        """Rows of an epoch; None for data of unknown length."""
        try:
            return len(self.train_dataset)  # type: ignore[arg-type]
        except TypeError:
            return None

    # --- resuming

    def checkpoint_named(self, wanted: str | bool | None) -> str | None:
        """The checkpoint that an argument of `train` means; True is the newest that is whole."""
        if wanted is True:
            self.args.resume_from_checkpoint = "true"
            return checkpoint_to_resume(self.args)
        return wanted or None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._stopped_early = False
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._stopped_early or self.state.global_step >= self.state.max_steps:
            logger.info("nothing is left to train: the checkpoint is of a run that has ended")
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_callback_state(self) -> None:
        # `Trainer` would put new callbacks in the place of these, and at the end of all, and only if asked to
        kept: Any = self.state.stateful_callbacks
        control = kept.get(TrainerControl.__name__, {"args": {}})
        stopped = control["args"].get("should_training_stop", False)
        self._stopped_early = stopped and self.state.global_step < self.state.max_steps
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                # a callback that is new in this run is not in the state yet, and `Trainer` wants it there
                saved = kept.setdefault(type(callback).__name__, callback.state())
                for name, value in saved["attributes"].items():
                    setattr(callback, name, value)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            write_json(Path(output_dir) / SCALER_FILE, self.accelerator.scaler.state_dict())

    def _load_scaler(self, resume: str | None) -> None:
        path = Path(resume or "") / SCALER_FILE
        if resume is not None and self.accelerator.scaler is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
