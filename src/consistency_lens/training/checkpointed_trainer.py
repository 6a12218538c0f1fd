"""Checkpoints of a trainer: whole, without pickle, with all that a resumed run needs."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..atomic_write import write_json, write_tensors
from ..checkpoints import states
from ..checkpoints.resuming import PROGRESS_FILE, check_same_run
from ..lens_decoder import LensDecoder
from .arguments import ConsistencyLensTrainingArguments
from .interruption import UndisturbedWorker
from .publishing_trainer import PublishingTrainer
from .sharding import weights_of
from .timetable import Timetable
from .warm_start_end import WarmStartEnd

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"
WARM_START_FILE = "warm_start.json"


class CheckpointedTrainer(PublishingTrainer):
    """The half of `ConsistencyLensTrainer` that saves and restores.

    A run that goes on from a checkpoint is the run that was never disturbed: model, optimizer, schedules, place in the
    data, random states of every process, counters, and what was summed up since the last log.

    Attributes:
        weights: how the processes hold them.
        warm_start_end: what may end warm start early, if asked for.
        kept: further states that checkpoints hold, by the names of their files.
    """

    args: ConsistencyLensTrainingArguments
    warm_start_end: WarmStartEnd | None = None
    _reference: LensDecoder | None = None
    _sums: dict[str, Tensor]
    _counts: dict[str, Tensor | int]
    _since: tuple[int, int, float]
    _training_since: float | None

    def __init__(self, *args: Any, **kwargs: Any):
        self.kept: dict[str, states.Kept] = {}
        super().__init__(*args, **kwargs)
        self.weights = weights_of(self.accelerator)

    def timetable(self, total_steps: int | None = None) -> Timetable:
        """The stages as they lie now."""
        raise NotImplementedError

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # what accelerate wraps, and iterates over
        inner.worker_init_fn = UndisturbedWorker(inner.worker_init_fn)
        return loader

    # --- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the lens, its trained tensors whole whatever holds them; every process has to call it."""
        self._save(output_dir, self.weights.gather(self.lens, keep=bool(self.args.should_save)))
        if self.args.push_to_hub and not _internal_call:
            self.push_output_dir("Model save")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        try:
            self.lens.save_pretrained(folder, state_dict=state_dict)
        except SafetensorError as error:
            raise OSError(f"cannot write {str(folder)!r}: {error}") from error
        write_json(folder / "training_arguments.json", json.loads(self.args.to_json_string()))

    def progress(self) -> dict[str, Any]:
        """Where the run is, by its settings."""
        step = self.state.global_step
        return {
            "step": step,
            "stage": 1 + self.timetable().stage_at(max(0, step - 1))[0],
            "processes": self.args.world_size,
            "rows_per_step": self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            "training_rows": self.num_training_rows(),
            "kept": sorted(self.kept),
        }

    # --- resuming

    def check_resume(self, folder: Path) -> None:
        """Compares this run with its checkpoint.

        Raises:
            ValueError: if the run cannot go on with the settings that it has now.
        """
        recipe = (self.lens.provenance or {}).get("recipe", {})
        settings = json.loads(json.dumps({**recipe, **json.loads(self.args.to_json_string())}))
        for difference in check_same_run(folder, self.progress(), settings):
            if self.args.process_index == 0:
                logger.warning("resumed with %s", difference)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = Path(resume_from_checkpoint) / "model.safetensors"
        if not weights.is_file():
            raise ValueError(
                f"checkpoint: no {weights.name} in {str(weights.parent)!r}; pass a checkpoint-<step> folder"
            )
        self.weights.fill(self.lens, load_file(weights))

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
        return past_warm_start and self.args.keeps_warm_start()

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
        self._reference = self.weights.frozen_copy(self.lens.decoder)
        self.weights.fill(self._reference, load_file(path))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, writes = Path(output_dir), bool(self.args.should_save)
        # what is spread over processes is put together by all of them
        kept = {name: kept.state() for name, kept in self.kept.items()}
        reference = None if self._reference is None else self.weights.gather(self._reference, keep=writes)
        self.weights.save_optimizer(self.optimizer, self.deepspeed, folder, keep=writes)
        if not writes:
            return
        write_json(folder / PROGRESS_FILE, self.progress())
        for name, state in kept.items():
            states.save_state(folder, name, state)
        states.save_scheduler(self.lr_scheduler, folder)
        if self.warm_start_end is not None:
            write_json(folder / WARM_START_FILE, self.warm_start_end.state())
        if reference is not None:
            write_tensors(folder / REFERENCE_FILE, reference)

    def _load_optimizer_and_scheduler(self, resume: str | None) -> None:
        if resume is None:
            return
        folder = Path(resume)
        self.load_warm_start_end(folder)
        self.check_resume(folder)
        self.load_reference(folder)
        for name, kept in self.kept.items():
            kept.load_state(states.load_state(folder, name))
        self.weights.load_optimizer(self.optimizer, folder)
        states.load_scheduler(self.lr_scheduler, folder)

    def _save_rng_state(self, output_dir: str) -> None:
        states.save_random_states(Path(output_dir), self.args.process_index)
        write_tensors(Path(output_dir) / unlogged_file(self.args.process_index), self.unlogged())

    def _load_rng_state(self, resume: str | None) -> None:
        if resume is None:
            return
        if not states.load_random_states(Path(resume), self.args.process_index):
            logger.warning("no random states of process %d in %s; sampling restarts", self.args.process_index, resume)
        path = Path(resume) / unlogged_file(self.args.process_index)
        if path.is_file():
            self.load_unlogged(load_file(path))

    def unlogged(self) -> dict[str, Tensor]:
        """What this process has summed up since the last log, and how long ago that was and the training began."""
        now = time.perf_counter()
        samples, tokens, since = self._since
        seconds = [now - since, now - (self._training_since or now)]
        sums = {f"sum.{name}": value for name, value in self._sums.items()}
        counts = {f"count.{name}": torch.as_tensor(count) for name, count in self._counts.items()}
        return {
            "loss": self._tr_loss,
            "numbers": torch.tensor([self._globalstep_last_logged, samples, tokens]),
            "seconds": torch.tensor(seconds, dtype=torch.float64),
            **sums,
            **counts,
        }

    def load_unlogged(self, saved: dict[str, Tensor]) -> None:
        """Takes what `unlogged` gave."""
        now = time.perf_counter()
        since, training_since = (now - seconds for seconds in saved["seconds"].tolist())
        last_logged, samples, tokens = saved["numbers"].tolist()
        self._tr_loss = saved["loss"].to(self.args.device)
        self._total_loss_scalar -= self._tr_loss.item()  # `train_loss` is of the steps of this start alone
        self._globalstep_last_logged = last_logged
        self._since, self._training_since = (samples, tokens, since), training_since
        for name, value in saved.items():
            kind, _, rest = name.partition(".")
            if kind == "sum":
                self._sums[rest] = value.to(self.args.device)
            elif kind == "count":
                self._counts[rest] = int(value)


def unlogged_file(process_index: int) -> str:
    """The name of what one process had not logged yet."""
    return f"unlogged_{process_index}.safetensors"
