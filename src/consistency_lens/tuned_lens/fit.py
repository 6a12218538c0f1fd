"""The whole fit of a tuned lens: text, closed form, KL steps, held-out figures, and an artifact with its provenance.

What a killed fit has done is kept, and the same command goes on from there: the blocks of text, the sums of the closed
form, and the checkpoints of the KL steps. What is finished is kept too, unless the fit is forced.
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..atomic_write import write_json
from ..checkpoints.resuming import checkpoint_to_resume
from ..checkpoints.run_folder import sole_training
from ..data.activation_cache import file_hash
from ..data.subject_loading import LoadedSubject, check_loading, load_subject_and_tokenizer
from ..fingerprints import tokenizer_hash, weights_hash
from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from .configuration_tuned_lens import default_rank
from .fit_arguments import AUTO, FULL, FitArguments, TunedLensTrainingArguments
from .fit_folder import (
    BLOCKS_FOLDER,
    RIDGE_FOLDER,
    SETTINGS_FILE,
    check_folder,
    claim,
    differences,
    lens_in,
    read_json,
    remove_work,
)
from .fitter import TunedLensFitter, check_rows
from .held_out import LENSES
from .lens_places import METRICS_FILE, default_folder
from .modeling_tuned_lens import TunedLens
from .provenance import provenance_of
from .readout import Readout, check_head
from .residual_batches import make_head, position_bounds, read_residuals, sampled_positions
from .token_blocks import TokenBlocks, block_length, read_token_blocks
from .trainer import TunedLensTrainer

logger = logging.getLogger(__name__)

MOMENTS_FILE = "moments.safetensors"
# batches of the closed form, after which its sums are written down
KEEP_EVERY = 100


class FitResult(NamedTuple):
    """What a fit has left."""

    output_dir: Path
    metrics: dict[str, Any]
    was_there: bool
    """Whether the lens had been fitted before, and was left as it is."""
    others: Sequence[str] = ()
    """Settings of that earlier fit that were others, such as "rank 'auto', now '8'"."""


def fit_tuned_lens(args: FitArguments, training: TunedLensTrainingArguments) -> FitResult:
    """Fits a lens, or goes on with one that a killed fit has left.

    Raises:
        ValueError: for a user's mistake, also a folder with a fit of other settings or another model.
        HubError: if the Hub cannot be reached.
        CheckpointWriteError: if a checkpoint cannot be written.
    """
    folder = Path(training.output_dir or default_folder(args.model))
    training.output_dir = str(folder)
    named = asdict(args) | training.to_json_settings() | {"world_size": training.world_size}
    settings = json.loads(json.dumps(named, default=str))
    _check_device(args, training)
    check_folder(folder)
    state = training.distributed_state or PartialState()
    if args.force or not lens_in(folder, args.model):
        with sole_training(folder) if state.is_main_process else nullcontext():
            return _Fit(args, training, folder, state, settings).run()
    if state.is_main_process:  # a fit may have been killed at it
        remove_work(folder)
    metrics, before = (read_json(folder / name) for name in (METRICS_FILE, SETTINGS_FILE))
    return FitResult(folder, metrics, was_there=True, others=differences(before, settings))


def _check_device(args: FitArguments, training: TunedLensTrainingArguments) -> None:
    """Raises a ValueError for a device that is not to be had, or not the one that the KL steps run on."""
    check_loading(args.dtype, None, args.device, args.device_map)
    if args.device is not None and torch.device(args.device).type != training.device.type:
        raise ValueError(
            f"device: got {args.device!r}, but the fit runs on {str(training.device)!r}; leave it out, or pass "
            "--use_cpu true for the CPU"
        )


class _Fit:
    """One fit, step by step; each step finds what it had done before it was killed."""

    def __init__(
        self,
        args: FitArguments,
        training: TunedLensTrainingArguments,
        folder: Path,
        state: PartialState,
        settings: dict[str, Any],
    ) -> None:
        self.args, self.training, self.folder, self.state = args, training, folder, state
        self.settings = settings
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def run(self) -> FitResult:
        training = self.training
        subject, lens, identity = self.load()
        self.claim(identity, force=self.args.force)
        blocks = self.read_text(subject)
        self.claim(identity | {"dataset_content_hash": blocks.description["content_hash"]})
        num_blocks, seq_len = blocks.train.shape
        ridge_blocks = self.ridge_blocks(num_blocks, seq_len, lens.config.width)
        training.resume_from_checkpoint = "auto"
        checkpoint = checkpoint_to_resume(training)
        if checkpoint is None:  # which holds what the closed form has come to
            self.start_close(lens, blocks.train, ridge_blocks)
        self._lap("ridge")
        trainer = TunedLensTrainer(lens, training, blocks.train[ridge_blocks:], blocks.validation, ridge_blocks)
        trainer.train(resume_from_checkpoint=checkpoint)
        self._lap("training")
        # as `eval` measures it, whatever the steps were taken in
        held_out = trainer.held_out(None, LENSES, make_head(lens, "float32"), progress=self._shows_progress)
        self._lap("evaluation")
        ridge_tokens = ridge_blocks * seq_len
        lens.provenance = provenance_of(self.args, trainer, blocks.description, identity, ridge_tokens, held_out)
        metrics = held_out.metrics() | {"seconds": self.seconds, "tokens": lens.provenance["tokens_consumed"]}
        if self.state.is_main_process:
            self.write(lens, metrics)
        self.state.wait_for_everyone()
        return FitResult(self.folder, metrics, was_there=False)

    def load(self) -> tuple[LoadedSubject, TunedLens, dict[str, Any]]:
        """The subject, a new lens of it, and what tells it from others; all that can be checked without text is.

        Raises:
            ValueError: for a user's mistake.
        """
        args = self.args
        device = None if args.device_map else args.device or self.training.device
        subject = load_subject_and_tokenizer(
            args.model, args.revision, args.dtype, device=device, device_map=args.device_map
        )
        check_head(args.model, subject.model)
        lens = self.new_lens(subject)
        seq_len = block_length(args, subject.model)
        self.ridge_blocks(-(-args.tokens // seq_len), seq_len, lens.config.width)
        identity = {
            "model_commit": subject.revision,
            "tokenizer_commit": subject.revision,
            "weights_hash": weights_hash(subject.model),
            "tokenizer_hash": tokenizer_hash(subject.tokenizer),
        }
        self._lap("loading")
        return subject, lens, identity

    def claim(self, found: dict[str, Any], force: bool = False) -> None:
        """Makes sure that an unfinished fit in the folder is this one: see `claim`."""
        if self.state.is_main_process:
            claim(self.folder, self.settings | found, force)
        self.state.wait_for_everyone()

    def read_text(self, subject: LoadedSubject) -> TokenBlocks:
        """The text as blocks of tokens."""
        blocks = read_token_blocks(
            self.args, subject.model, subject.tokenizer, self.args.model, self.folder / BLOCKS_FOLDER,
            self.training.seed, self.state, progress=self._shows_progress,
        )  # fmt: skip
        self._lap("text")
        return blocks

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

    def ridge_blocks(self, num_blocks: int, seq_len: int, width: int) -> int:
        """How many of the first blocks are the closed form's; the rest is for the KL steps.

        Raises:
            ValueError: if no step is left, or they are too few for the closed form.
        """
        first, end = position_bounds(self.training.position_range, seq_len)
        count = -(-int(self.args.ridge_tokens or 0) // seq_len)
        if count >= num_blocks:
            raise ValueError(
                f"ridge_tokens: {self.args.ridge_tokens} take all {num_blocks} sequences of text, and none is left "
                "for the KL steps; lower it, or raise tokens"
            )
        if count:
            check_rows(count * (end - first), width)
        return count

    def start_close(self, lens: TunedLens, blocks: np.ndarray, ridge_blocks: int) -> None:
        """The closed form on the first blocks; without it the norm lens's temperatures alone, from one batch."""
        if ridge_blocks:
            self.solve(lens, blocks[:ridge_blocks])
            return
        fitter = TunedLensFitter(lens, make_head(lens, self.training.head_dtype), self.args.ridge)
        bounds = position_bounds(self.training.position_range, blocks.shape[1])
        self._update(fitter, blocks[: self.training.per_device_train_batch_size], bounds)
        fitter.calibrate_norm_lens()

    def solve(self, lens: TunedLens, blocks: np.ndarray) -> None:
        """Sums up moments and solves; every process does all of it, which spares them to exchange the sums."""
        bounds = position_bounds(self.training.position_range, blocks.shape[1])
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
        fitter.update(read_residuals(lens, input_ids, positions, range(lens.num_layers - 1)))

    def write(self, lens: TunedLens, metrics: dict[str, Any]) -> None:
        """Writes the artifact, its provenance last, and removes what only an unfinished fit needs."""
        provenance, lens.provenance = lens.provenance, None
        lens.save_pretrained(self.folder)
        write_json(self.folder / METRICS_FILE, metrics)
        digests = {WEIGHTS_FILE: file_hash(self.folder / WEIGHTS_FILE)}
        lens.provenance = {**(provenance or {}), "sha256": digests}
        write_json(self.folder / PROVENANCE_FILE, lens.provenance)
        remove_work(self.folder)


def _resumed(fitter: TunedLensFitter, file: Path, seq_len: int, bounds: tuple[int, int]) -> int:
    """Takes the sums that a killed fit has left; returns how many blocks are in them."""
    if not file.is_file():
        return 0
    fitter.load(file)
    blocks = fitter.rows // (bounds[1] - bounds[0])
    logger.info("the closed form goes on after %d sequences of %d tokens", blocks, seq_len)
    return blocks
