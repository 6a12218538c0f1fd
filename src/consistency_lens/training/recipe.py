"""From a recipe to a lens: subject, corpus, cache, training, evaluation. `cli.train` and the example call `run`."""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset
from transformers import set_seed

from .. import __version__
from ..atomic_write import write_json
from ..checkpoints.resuming import checkpoint_to_resume
from ..checkpoints.run_folder import sole_training
from ..context_length import context_length
from ..data.activation_source import rows_at
from ..data.sources import Reader, SplitRows, dataset_of, layer_of, open_rows
from ..data.subject_loading import LoadedSubject, load_subject_and_tokenizer
from ..data.summaries import SummaryRows, read_summaries
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.evaluator import Evaluator, write_metrics
from ..evaluation.metrics import start_token
from ..evaluation.samples import Sample, collect_samples, write_samples
from ..evaluation.saved_lens import collator_for
from ..hub.lens_card import write_lens_card
from ..hub.upstream_license import license_in_card
from ..modeling_consistency_lens import ConsistencyLensModel
from ..residual_stream import ResidualStream
from .arguments import ConsistencyLensTrainingArguments
from .combinations import INTERIM_CONTROLS, check_recipe
from .evaluation_callback import EvaluateLens
from .interruption import Interruption, interruptible
from .publishing_trainer import make_repository
from .recipe_arguments import RecipeArguments
from .run_names import name_run
from .run_record import run_record, software
from .sample_tables import SampleTables
from .sharding import make_models_whole
from .sharding_arguments import spread_by
from .trainer import ConsistencyLensTrainer, check_settings
from .trial_settings import check_trial_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the lens, where it lies, its held-out figures and sample rows."""

    lens: ConsistencyLensModel
    output_dir: Path
    metrics: dict[str, Any]
    samples: list[Sample]


class Clock:
    """Wall seconds of each part of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now


def check_length(args: RecipeArguments, subject: LoadedSubject) -> None:
    """Checks that the subject can read documents of the length that is asked for.

    Raises:
        ValueError: if they are beyond its context.
    """
    context = context_length(subject.model.config)
    if args.reads_text and context is not None and args.max_length > context:
        raise ValueError(f"max_length {args.max_length} is beyond the subject's context of {context}; lower it")


def make_lens(args: RecipeArguments, subject: LoadedSubject, layer: int) -> ConsistencyLensModel:
    """A new lens for the subject; the statistics of its training rows come later."""
    model, tokenizer = subject.model, subject.tokenizer
    start_token(model.config.get_text_config())  # texts are measured behind it
    if args.stop_at_eos and tokenizer.eos_token_id is None:
        raise ValueError("stop_at_eos: the subject's tokenizer has no EOS token; set it to false")
    lora = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "target_modules": args.lora_targets}
    return ConsistencyLensModel.from_subject(
        model,
        tokenizer,
        layer,
        num_text_tokens=args.num_text_tokens,
        training=args.clones,
        lora=lora if args.clones == "lora" else None,
        decoder_prompt=args.decoder_prompt,
        encoder_prompt=args.encoder_prompt,
        injection_layers=args.injection_layers,
        stop_token_id=tokenizer.eos_token_id if args.stop_at_eos else None,
        output_layer=args.output_layer,
        revision=subject.revision,
        blocks=args.blocks,
        final_norm=args.final_norm,
    )


def make_checked_lens(
    args: RecipeArguments, training_args: ConsistencyLensTrainingArguments, subject: LoadedSubject
) -> ConsistencyLensModel:
    """A new lens for the subject, which fits the training arguments.

    Raises:
        ValueError: if they do not go together, or the subject cannot be read so.
    """
    check_length(args, subject)
    lens = make_lens(args, subject, layer_to_read(args, subject))
    check_settings(lens, training_args)
    check_trial_settings(lens, training_args)
    return lens


def run(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments) -> RunResult:
    """Trains and evaluates one lens; every artifact lies under `training_args.output_dir`.

    Raises:
        ValueError: for a user's mistake, before any long work starts.
        RunInterrupted: if SIGTERM or SIGUSR1 came.
    """
    with ExitStack() as held, interruptible(training_args) as interruption:
        return train_and_evaluate(args, training_args, interruption, held)


def train_and_evaluate(
    args: RecipeArguments, training_args: ConsistencyLensTrainingArguments, interruption: Interruption, held: ExitStack
) -> RunResult:
    """As `run`; `interruption` is told when the training begins and ends, `held` has the run's folder till the end."""
    clock = Clock()
    set_seed(training_args.seed)
    resume = checkpoint_to_resume(training_args)
    training_args.check_stages()
    check_recipe(args, training_args)
    if training_args.push_to_hub and training_args.process_index == 0:
        make_repository(training_args)
    make_models_whole()
    # what is spread over processes is made on the CPU, for one device alone may not have room for it
    spread = spread_by(training_args) is not None
    subject = load_subject(args, torch.device("cpu") if spread else training_args.device)
    # made before any activations, so that every mistake in its settings is found before the long work
    lens = make_checked_lens(args, training_args, subject)
    name_run(training_args, dataset_of(args), args.model, lens.config.layer, resume)
    output_dir = Path(str(training_args.output_dir))
    if training_args.process_index == 0:
        held.enter_context(sole_training(output_dir))
    if spread:
        subject.model.to(training_args.device)  # type: ignore[arg-type]  # here it is still whole, and read
    summaries = read_checked_summaries(args, training_args)
    folder = Path(args.cache_dir) if args.cache_dir else output_dir / "data"
    rows = open_rows(
        args,
        Reader(lens.subject, subject.tokenizer, args.model, subject.revision),
        folder,
        training_args.seed,
        pair_seed=training_args.seed if training_args.needs_others() else None,
        pair_in_batch=training_args.pair_in_batch,
        state=training_args.distributed_state if training_args.world_size > 1 else None,
    )
    clock.lap("corpus_and_cache")
    describe_training(lens, args, rows, training_args.seed)
    if summaries is not None:
        rows = with_summaries(rows, summaries, args, lens)
    trainer = make_trainer(args, training_args, lens, rows)
    trainer.add_callback(interruption)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        rows.close()
    interruption.raise_if_received()
    lens.eval()
    remove_figures(training_args)
    trainer.save_model(_internal_call=True)  # it is published with its card
    clock.lap("training")
    metrics: dict[str, Any] = {}
    samples: list[Sample] = []
    if trainer.is_world_process_zero():
        if spread:
            trainer.lens = lens = load_whole(args, trainer, output_dir)
        metrics, samples = evaluate_and_write(args, trainer, rows, clock, output_dir)
        if training_args.push_to_hub:
            trainer.push_output_dir()
    return RunResult(lens, output_dir, metrics, samples)


def load_subject(args: RecipeArguments, device: torch.device) -> LoadedSubject:
    """The subject of a recipe."""
    return load_subject_and_tokenizer(args.model, args.revision, args.dtype, args.quantization, args.attention, device)


def load_whole(args: RecipeArguments, trainer: ConsistencyLensTrainer, output_dir: Path) -> ConsistencyLensModel:
    """The lens that a run has just saved, whole, where its processes have only parts; its subject takes its place."""
    trainer.weights.release(trainer.lens, trainer.optimizer)
    subject = load_subject(args, trainer.args.device)
    trainer.lens.subject.change_model(subject.model)  # rows that are read on the fly have it too
    lens = ConsistencyLensModel.from_pretrained(output_dir, base_model=subject.model, verify_base=False)
    return lens.to(trainer.args.device)  # type: ignore[arg-type]


def layer_to_read(args: RecipeArguments, subject: LoadedSubject) -> int:
    """The layer that is asked for; else that of the activations, where they are there already, or the middle."""
    layer = layer_of(args) if args.layer is None else args.layer
    if layer is not None:
        return layer
    return ResidualStream(subject.model, blocks=args.blocks, final_norm=args.final_norm).num_layers // 2


def describe_training(lens: ConsistencyLensModel, args: RecipeArguments, rows: SplitRows, seed: int) -> None:
    """Gives the lens the statistics of its training rows, and its provenance."""
    lens.set_statistics(rows.mean, rows.rms)
    long = ("mean", "shards", "parquet", "seen_in_training")
    base = license_in_card(args.model, lens.config.base_model_revision)
    lens.provenance = {
        "consistency_lens": __version__,
        "recipe": asdict(args),
        "cache": {key: value for key, value in rows.provenance.items() if key not in long},
        "seed": seed,
        "held_out_fraction": rows.fraction,
        "train_rows": len(rows.train),
        "validation_rows": len(rows.held_out),
        "trained_parameters": sum(tensor.numel() for tensor in lens.trained_tensors().values()),
        "base_license": {"name": base.name, "title": base.title, "link": base.link},
        **software(),
    }


def read_checked_summaries(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments) -> Dataset | None:
    """The summaries that are asked for.

    Raises:
        ValueError: if they cannot be read, or do not go with the other settings.
    """
    if args.summaries is None:
        return None
    if training_args.needs_others():
        raise ValueError("summaries: their rows have no second activation; set delta_residual to none")
    if args.is_streamed:
        raise ValueError("summaries: they cannot be mixed into a stream; pull the cache and pass its folder")
    return read_summaries(args.summaries)


def with_summaries(
    rows: SplitRows, summaries: Dataset, args: RecipeArguments, lens: ConsistencyLensModel
) -> SplitRows:
    """The rows of a run with those of summaries among them."""
    tokenizer, first_row = lens.require_tokenizer(), rows.provenance["rows"]
    extra = SummaryRows(summaries, lens.subject, tokenizer, args.max_length, first_row=first_row)
    return rows._replace(train=ConcatDataset([rows.train, extra]))


def make_trainer(
    args: RecipeArguments,
    training_args: ConsistencyLensTrainingArguments,
    lens: ConsistencyLensModel,
    rows: SplitRows,
) -> ConsistencyLensTrainer:
    """The trainer; during training it looks at a fixed few of the held-out rows."""
    count = min(args.interim_eval_rows, len(rows.held_out))
    few = np.random.default_rng(training_args.seed).choice(len(rows.held_out), count, replace=False)
    trainer = ConsistencyLensTrainer(
        model=lens,
        args=training_args,
        train_dataset=rows.train,
        eval_dataset=rows_at(rows.held_out, few.tolist()),
        data_collator=collator_for(lens),
    )
    watch_held_out_rows(args, trainer, rows)
    return trainer


def watch_held_out_rows(args: RecipeArguments, trainer: ConsistencyLensTrainer, rows: SplitRows) -> None:
    """Adds to a trainer what reads held-out rows during training: sample tables, and the figures of an evaluation."""
    if args.sample_steps > 0:
        trainer.add_callback(SampleTables(trainer, rows.held_out, args.sample_steps, args.tracked_samples))
    few: Any = trainer.eval_dataset
    collator: Any = trainer.data_collator
    arguments = EvaluationArguments(rows=args.interim_eval_rows, controls=list(INTERIM_CONTROLS), disable_tqdm=True)
    # the first of all, so that early stopping and the like find its figures
    evaluate = EvaluateLens(trainer, Evaluator(trainer.lens, few, collator, arguments))
    trainer.callback_handler.callbacks.insert(0, evaluate)


def remove_figures(training_args: ConsistencyLensTrainingArguments) -> None:
    """Removes what was measured of an earlier lens in the folder, so that it never stands beside a new one."""
    if training_args.process_index == 0:
        for name in ("run.json", "metrics.json", "samples.jsonl", "log_history.json", "README.md"):
            Path(str(training_args.output_dir), name).unlink(missing_ok=True)


def evaluate_and_write(
    args: RecipeArguments, trainer: ConsistencyLensTrainer, rows: SplitRows, clock: Clock, output_dir: Path
) -> tuple[dict[str, Any], list[Sample]]:
    """Measures the lens on held-out rows and writes figures, samples, curves, arguments and card."""
    training_args, held_out = trainer.args, rows.held_out
    collator: Any = trainer.data_collator
    evaluation = EvaluationArguments(
        rows=args.eval_rows,
        checks=args.eval_checks,
        fresh_encoder_steps=args.eval_fresh_encoder_steps,
        disable_tqdm=bool(training_args.disable_tqdm),
    )
    metrics = Evaluator(trainer.lens, held_out, collator, evaluation, rows.true_text)()
    samples = collect_samples(trainer.lens, held_out, collator, count=args.num_samples, seed=evaluation.seed)
    clock.lap("evaluation")
    resolved = {"recipe": asdict(args), "training": training_args.to_dict()}
    record = run_record(args, training_args, trainer.state.global_step, clock.laps)
    write_metrics(output_dir / "metrics.json", metrics, resolved)
    write_samples(output_dir / "samples.jsonl", samples)
    write_json(output_dir / "run.json", {**record, **resolved})
    write_json(output_dir / "log_history.json", [without_nan(entry) for entry in trainer.state.log_history])
    write_lens_card(output_dir)
    return metrics, samples


def without_nan(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry with None for what is not finite, such as the gradient norm of a skipped step."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
