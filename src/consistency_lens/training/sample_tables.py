"""Sample tables: every so many steps a fixed set of held-out activations in the lens's words of then."""

import importlib
import io
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
from rich.console import Console
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..atomic_write import write_text
from ..data.activation_source import Rows
from ..evaluation.report import SAMPLE_COLUMNS, sample_values, samples_markdown, samples_table
from ..evaluation.samples import Sample, TrackedSamples
from .trainer import ConsistencyLensTrainer

logger = logging.getLogger(__name__)

SAMPLE_TABLES_FILE = "sample_tables.jsonl"
LOGGED_AS = "samples"
CONSOLE_ROWS = 6
CONSOLE_WIDTH = 150  # where there is no terminal to ask


class SampleTables(TrainerCallback):
    """Reads the same held-out activations every `every` steps, on the main process; the training does not notice.

    A table goes to `sample_tables.jsonl` in the run, one line a sample with its global step; to wandb, trackio and
    tensorboard where they are in `report_to`; and, a few rows of it, to the console where the progress bar is.
    A resumed run drops the lines of later steps, as it writes them again.

    Args:
        trainer: whose lens reads.
        rows: held-out rows of a cache.
        every: steps from one table to the next.
        count: activations in the set.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(self, trainer: ConsistencyLensTrainer, rows: Rows, every: int, count: int = 128) -> None:
        for name, value in (("every", every), ("count", count)):
            if value < 1:
                raise ValueError(f"sample tables: {name} must be at least 1, got {value}")
        self.trainer = trainer
        self.rows = rows
        self.every = every
        self.count = count
        self.path = Path(str(trainer.args.output_dir)) / SAMPLE_TABLES_FILE
        self.tracked: TrackedSamples | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            drop_steps_after(self.path, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reads = state.is_world_process_zero or self.trainer.weights.spread  # spread weights are read by all together
        if state.global_step % self.every or not reads:
            return
        samples = self.read()
        if not state.is_world_process_zero:
            return
        if not all(math.isfinite(sample.fve) and math.isfinite(sample.kl) for sample in samples):
            # A run may recover from a bad step; a table of NaN says nothing.
            logger.warning("sample tables: none at step %d, a reconstruction is not finite", state.global_step)
            return
        append_samples(self.path, state.global_step, samples)
        self.report(state.global_step, samples)
        if not args.disable_tqdm:
            tqdm.write(console_text(state.global_step, samples))

    def read(self) -> list[Sample]:
        """The tracked rows in the words of now; the rows are chosen when first asked for."""
        if self.tracked is None:
            trainer: Any = self.trainer
            collator, seed = trainer.data_collator, trainer.args.seed
            self.tracked = TrackedSamples(trainer.lens, self.rows, collator, self.count, seed)
        with self.trainer.averaged():
            return self.tracked.read()

    def report(self, step: int, samples: Sequence[Sample]) -> None:
        """Hands a table to the loggers of the run, which their own callbacks have started."""
        rows = [sample_values(sample) for sample in samples]
        for name in ("wandb", "trackio"):
            if name in (self.trainer.args.report_to or ()):
                package = importlib.import_module(name)
                # as a frame, for trackio takes no notice of `columns`
                table = package.Table(dataframe=pandas.DataFrame(rows, columns=list(SAMPLE_COLUMNS)))
                package.log({LOGGED_AS: table, "train/global_step": step})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(LOGGED_AS, samples_markdown(samples), step)


def append_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Appends one line a sample in one write, so that a killed run loses at most the table it was writing."""
    lines = (json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) for sample in samples)
    with open(path, "ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def drop_steps_after(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`, and drops what a killed run left of a line."""
    if not path.is_file():
        return
    # Not splitlines: a text may hold other line breaks than the one that ends a line.
    *lines, _rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))


def console_text(step: int, samples: Sequence[Sample]) -> str:
    """A few rows, from early to late positions, as wide as the terminal."""
    shown = samples[:: -(-len(samples) // CONSOLE_ROWS)]
    stream = io.StringIO()
    width = shutil.get_terminal_size((CONSOLE_WIDTH, 24)).columns
    Console(file=stream, width=width).print(samples_table(shown, title=f"step {step}: held-out samples; KL in nats"))
    return stream.getvalue().rstrip("\n")
