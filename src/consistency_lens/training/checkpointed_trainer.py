"""Checkpoints of a trainer: whole, without pickle, with all that a resumed run needs."""

import json
import logging
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from ..atomic_write import write_json, write_tensors
from ..lens_decoder import LensDecoder
from ..modeling_consistency_lens import ConsistencyLensModel
from . import checkpoint
from .arguments import ConsistencyLensTrainingArguments
from .objectives import freeze_copy
from .timetable import Timetable
from .warm_start_end import WarmStartEnd

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"
SCALER_FILE = "scaler.json"
WARM_START_FILE = "warm_start.json"


class CheckpointedTrainer(Trainer):
    """The half of `ConsistencyLensTrainer` that saves and restores.

    Attributes:
        lens: without wrapper.
        warm_start_end: what may end warm start early, if asked for.
    """

    args: ConsistencyLensTrainingArguments
    lens: ConsistencyLensModel
    warm_start_end: WarmStartEnd | None = None
    _reference: LensDecoder | None = None

    def timetable(self, total_steps: int | None = None) -> Timetable:
        """The stages as they lie now."""
        raise NotImplementedError

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.lens.save_pretrained(folder, state_dict=state_dict)
        write_json(folder / "training_arguments.json", json.loads(self.args.to_json_string()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            if self.needs_reference(folder):
                raise ValueError(
                    "resume_from_checkpoint: FSDP and DeepSpeed do not keep the reference of the lm term; "
                    "resume from a checkpoint of the warm start, or set lm_reference to subject"
                )
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ValueError(f"checkpoint: no {weights.name} in {str(folder)!r}; pass a checkpoint-<step> folder")
        self.load_warm_start_end(folder)
        self.load_reference(folder)
        self.lens.load_trained_tensors(load_file(weights))

    def load_warm_start_end(self, folder: Path) -> None:
        """Which stages had ended early when the checkpoint was written.

        Raises:
            ValueError: if `warm_start_patience` was on and is off now, or the other way round.
        """
        path = folder / WARM_START_FILE
        if path.is_file() != (self.warm_start_end is not None):
            before, now = ("off", "on") if self.warm_start_end is not None else ("on", "off")
            raise ValueError(
                f"warm_start_patience: it is {now}, but was {before} in {str(folder)!r}; set it as it was"
            )
        if self.warm_start_end is not None:
            self.warm_start_end.load_state(json.loads(path.read_text(encoding="utf-8")))

    def needs_reference(self, folder: Path) -> bool:
        """Whether a run that goes on from a checkpoint has passed its warm start and is held close to it."""
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        index, start, _ = self.timetable(state["max_steps"]).stage_at(state["global_step"])
        if state["global_step"] == start:
            index -= 1  # the checkpoint was written before the first step of this stage
        past_warm_start = any(stage.objective != "warm_start" for stage in self.args.parsed_stages()[: index + 1])
        return past_warm_start and self.args.lm_reference == "warm_start" and self.args.has_weight("lm")

    def load_reference(self, folder: Path) -> None:
        """Rebuilds the reference that warm start had left when the checkpoint was written.

        Raises:
            ValueError: if the run has passed its warm start and the file is not there.
        """
        if not self.needs_reference(folder):
            return
        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise ValueError(f"checkpoint: {path.name} is missing in {str(folder)!r}; resume from an earlier one")
        self.lens.decoder.load_trained_tensors(load_file(path))
        self._reference = freeze_copy(self.lens.decoder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            checkpoint.save_optimizer(self.optimizer, Path(output_dir))
            checkpoint.save_scheduler(self.lr_scheduler, Path(output_dir))
            if self.warm_start_end is not None:
                write_json(Path(output_dir) / WARM_START_FILE, self.warm_start_end.state())
            if self._reference is not None:
                write_tensors(Path(output_dir) / REFERENCE_FILE, self._reference.trained_tensors())

    def _load_optimizer_and_scheduler(self, resume: str | None) -> None:
        if resume is None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(resume)
        else:
            checkpoint.load_optimizer(self.optimizer, Path(resume))
            checkpoint.load_scheduler(self.lr_scheduler, Path(resume))

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            write_json(Path(output_dir) / SCALER_FILE, self.accelerator.scaler.state_dict())

    def _load_scaler(self, resume: str | None) -> None:
        path = Path(resume or "") / SCALER_FILE
        if resume is not None and self.accelerator.scaler is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_random_states(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, resume: str | None) -> None:
        if resume is not None and not checkpoint.load_random_states(Path(resume), self.args.process_index):
            logger.warning("no random states of process %d in %s; sampling restarts", self.args.process_index, resume)
