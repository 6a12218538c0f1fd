"""The whole fit of a tuned lens: text, closed form, KL steps, held-out figures, and an artifact with its provenance.

What a killed fit has done is kept, and the same command goes on from there: the blocks of text, the sums of the closed
form, and the checkpoints of the KL steps. What is finished is kept too, unless the fit is forced.
"""

import json
import logging
import shutil
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..atomic_write import write_json
from ..checkpoints.resuming import checkpoint_to_resume
from ..data.fingerprints import tokenizer_hash, weights_hash
from ..data.subject_loading import LoadedSubject, load_subject_and_tokenizer
from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from .configuration_tuned_lens import default_rank
from .fit_arguments import AUTO, FULL, FitArguments, TunedLensTrainingArguments
from .fitter import TunedLensFitter
from .held_out import LENSES
from .modeling_tuned_lens import TunedLens
from .provenance import clean_name, provenance_of
from .readout import Readout
from .residual_batches import make_head, position_bounds, read_batch, sampled_positions
from .token_blocks import TokenBlocks, read_token_blocks
from .trainer import TunedLensTrainer

logger = logging.getLogger(__name__)

LENSES_FOLDER = Path("tuned_lenses")
SETTINGS_FILE, METRICS_FILE = "fit.json", "metrics.json"
BLOCKS_FOLDER, RIDGE_FOLDER = "blocks", "ridge"
MOMENTS_FILE = "moments.safetensors"
# batches of the closed form, after which its sums are written down
KEEP_EVERY = 100
# arguments of which a fit that goes on may have others
FREE = ("force", "device", "device_map")


class FitResult(NamedTuple):
    """What a fit has left."""

    output_dir: Path
    metrics: dict[str, Any]
    was_there: bool
    """Whether the lens had been fitted before, and was left as it is."""


def default_folder(model: str) -> Path:
    """Where the lens of a model lies unless it is said: tuned_lenses/<name of the model>."""
    return LENSES_FOLDER / clean_name(model)


def fit_tuned_lens(args: FitArguments, training: TunedLensTrainingArguments) -> FitResult:
    """Fits a lens, or goes on with one that a killed fit has left.

    Raises:
        ValueError: for a user's mistake, also a folder with a fit of other settings.
        HubError: if the Hub cannot be reached.
        CheckpointWriteError: if a checkpoint cannot be written.
    """
    folder = Path(training.output_dir or default_folder(args.model))
    training.output_dir = str(folder)
    settings = {key: value for key, value in asdict(args).items() if key not in FREE} | training.to_json_settings()
    settings = json.loads(json.dumps(settings, default=str))
    if (folder / PROVENANCE_FILE).is_file() and not args.force:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        return FitResult(folder, metrics, was_there=True)
    state = training.distributed_state or PartialState()
    if state.is_main_process:
        _claim(folder, settings, args.force)
    state.wait_for_everyone()
    return _Fit(args, training, folder, state).run()


def _claim(folder: Path, settings: dict[str, Any], force: bool) -> None:
    """Writes the settings into the folder; what a fit of other settings has left there is an error, or is removed.

    Raises:
        ValueError: for a fit of other settings, or a folder that holds something else.
    """
    file = folder / SETTINGS_FILE
    if force:
        _remove_work(folder)
        for name in (PROVENANCE_FILE, WEIGHTS_FILE, METRICS_FILE, SETTINGS_FILE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / BLOCKS_FOLDER, ignore_errors=True)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"output_dir: {str(folder)!r} has an unfinished fit with {name} {before.get(name)!r}, now it is "
                f"{settings[name]!r}; set it as it was, take another output_dir, or pass --force to fit anew"
            )
    elif (folder / "config.json").is_file():
        raise ValueError(f"output_dir: {str(folder)!r} holds a model; take another, or pass --force to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _remove_work(folder: Path) -> None:
    """Removes what only an unfinished fit needs."""
    for work in [folder / RIDGE_FOLDER, *folder.glob("checkpoint-*")]:
        shutil.rmtree(work, ignore_errors=True)


class _Fit:
    """One fit, step by step; each step finds what it had done before it was killed."""

    def __init__(
        self, args: FitArguments, training: TunedLensTrainingArguments, folder: Path, state: PartialState
    ) -> None:
        self.args, self.training, self.folder, self.state = args, training, folder, state
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def run(self) -> FitResult:
        args, training = self.args, self.training
        device = None if args.device_map else args.device or training.device
        subject = load_subject_and_tokenizer(
            args.model, args.revision, args.dtype, device=device, device_map=args.device_map
        )
        lens = self.new_lens(subject)
        self._lap("loading")
        blocks = read_token_blocks(
            args, subject.model, subject.tokenizer, args.model, self.folder / BLOCKS_FOLDER, training.seed,
            self.state, progress=self._shows_progress,
        )  # fmt: skip
        self._lap("text")
        ridge_blocks = self.ridge_blocks(blocks)
        bounds = position_bounds(training.position_range, blocks.train.shape[1])
        if ridge_blocks:
            self.solve(lens, blocks.train[:ridge_blocks], bounds)
        self._lap("ridge")
        trainer = TunedLensTrainer(lens, training, blocks.train[ridge_blocks:], blocks.validation, ridge_blocks)
        training.resume_from_checkpoint = "auto"
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(training))
        self._lap("training")
        held_out = trainer.held_out(None, LENSES, progress=self._shows_progress)
        self._lap("evaluation")
        ridge_tokens = ridge_blocks * blocks.train.shape[1]
        identity = {
            "model_commit": subject.revision,
            "tokenizer_commit": subject.revision,
            "weights_hash": weights_hash(subject.model),
            "tokenizer_hash": tokenizer_hash(subject.tokenizer),
        }
        lens.provenance = provenance_of(args, trainer, blocks.description, identity, ridge_tokens, held_out)
        metrics = held_out.metrics() | {"seconds": self.seconds, "tokens": lens.provenance["tokens_consumed"]}
        if self.state.is_main_process:
            self.write(lens, metrics)
        self.state.wait_for_everyone()
        return FitResult(self.folder, metrics, was_there=False)

    @property
    def _shows_progress(self) -> bool:
        return self.state.is_main_process and not self.training.disable_tqdm

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.start = now - self.start, now

    def new_lens(self, subject: LoadedSubject) -> TunedLens:
        """A lens of the asked rank, close to the norm lens."""
        width = Readout(subject.model).weight.shape[1]
        ranks: dict[str, int | None] = {AUTO: default_rank(width), FULL: None}
        return TunedLens.for_model(
            subject.model,
            subject.tokenizer,
            rank=ranks[self.args.rank] if self.args.rank in ranks else int(self.args.rank),
            learn_temperature=self.args.learn_temperature,
            preconditioner=self.args.preconditioner,
            revision=subject.revision,
            seed=self.training.seed,
        )

    def ridge_blocks(self, blocks: TokenBlocks) -> int:
        """How many of the first blocks are the closed form's; the rest is for the KL steps.

        Raises:
            ValueError: if no step is left.
        """
        count = -(-int(self.args.ridge_tokens or 0) // blocks.train.shape[1])
        if count >= len(blocks.train):
            raise ValueError(
                f"ridge_tokens: {self.args.ridge_tokens} take all {len(blocks.train)} sequences of text, and none is "
                "left for the KL steps; lower it, or raise tokens"
            )
        return count

    def solve(self, lens: TunedLens, blocks: np.ndarray, bounds: tuple[int, int]) -> None:
        """Sums up moments and solves; every process does all of it, which spares them to exchange the sums."""
        folder = self.folder / RIDGE_FOLDER
        fitter = TunedLensFitter(lens, make_head(lens, self.training.head_dtype), self.args.ridge)
        read = _resumed(fitter, folder / MOMENTS_FILE, blocks.shape[1], bounds)
        size = self.training.per_device_train_batch_size
        starts = range(0, len(blocks), size)
        for number, start in enumerate(
            tqdm(starts, desc="closed form", unit=" batches", disable=not self._shows_progress)
        ):
            if start < read:
                continue
            self._update(fitter, blocks[start : start + size], bounds)
            if (number + 1) % KEEP_EVERY == 0 and self.state.is_main_process:
                fitter.save(folder / MOMENTS_FILE)
        fitter.solve()

    def _update(self, fitter: TunedLensFitter, blocks: np.ndarray, bounds: tuple[int, int]) -> None:
        lens = fitter.lens
        positions = sampled_positions(range(len(blocks)), None, bounds, self.training.seed)
        input_ids = torch.from_numpy(blocks.astype(np.int64))
        fitter.update(read_batch(lens, fitter.head, input_ids, positions, range(lens.num_layers - 1)))

    def write(self, lens: TunedLens, metrics: dict[str, Any]) -> None:
        """Writes the artifact, its provenance last, and removes what only an unfinished fit needs."""
        provenance, lens.provenance = lens.provenance, None
        lens.save_pretrained(self.folder)
        write_json(self.folder / METRICS_FILE, metrics)
        digest = sha256((self.folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        lens.provenance = {**(provenance or {}), "sha256": {WEIGHTS_FILE: digest}}
        write_json(self.folder / PROVENANCE_FILE, lens.provenance)
        _remove_work(self.folder)


def _resumed(fitter: TunedLensFitter, file: Path, seq_len: int, bounds: tuple[int, int]) -> int:
    """Takes the sums that a killed fit has left; returns how many blocks are in them."""
    if not file.is_file():
        return 0
    fitter.load(file)
    blocks = fitter.rows // (bounds[1] - bounds[0])
    logger.info("the closed form goes on after %d sequences of %d tokens", blocks, seq_len)
    return blocks
