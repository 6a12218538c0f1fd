"""A run that is only planned: settings are checked and everything is counted, but nothing is loaded or written."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_scheduler

from ..attention import AUTO
from ..checkpoints.resuming import checkpoint_to_resume
from ..data.expected_rows import ExpectedRows, expected_rows
from ..data.row_order import num_paired_rows
from ..data.sources import dataset_of
from ..data.subject_loading import LoadedSubject, load_tokenizer, not_loaded, pinned_revision
from ..data.text_source import Reader
from ..modeling_consistency_lens import ConsistencyLensModel
from ..schedules import ResolvedSchedule, Schedule
from .arguments import ConsistencyLensTrainingArguments
from .combinations import check_recipe
from .group_settings import of_group
from .memory_estimate import Memory, memory_estimates, num_bytes, quantised_bytes, unique
from .parameter_groups import parameter_groups
from .recipe import make_checked_lens, read_checked_summaries
from .recipe_arguments import RecipeArguments
from .run_names import name_run
from .timetable import Timetable, steps_in_epoch
from .unfreezing import Unfreezing

# what each objective is weighed by
SETTINGS = {
    "warm_start": ("ce_weight", "mse_weight"),
    "gumbel": ("tau", "kl_weight", "lm_weight", "mse_weight", "entropy_weight"),
    "policy_gradient": ("policy_weight", "mse_weight", "lm_weight"),
}
LENS_FILES = ("config.json", "model.safetensors", "provenance.json", "training_arguments.json", "tokenizer.json")
RUN_FILES = ("metrics.json", "samples.jsonl", "run.json", "log_history.json", "tracked_run.json", "README.md")
BYTES_PER_TOKEN, BYTES_PER_ROW = 4, 12  # of a cached context, and of its position and document


@dataclass(frozen=True)
class ParameterCount:
    """Numbers in one part: `total` is `trained` and `frozen`; `shared` of the frozen ones are the subject's own."""

    part: str
    total: int
    trained: int
    frozen: int
    shared: int


@dataclass(frozen=True)
class PlannedStage:
    """One stage, by its first and last step (from 1), and what changes in it.

    Attributes:
        rows: texts that the decoder writes in a step, all processes together.
        schedules: name -> (step, value) at each corner of the schedule.
    """

    objective: str
    first_step: int
    last_step: int
    rows: int
    schedules: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class RateGroup:
    """A parameter group of the optimizer, and the step (from 1) from which on it trains."""

    name: str
    parameters: int
    learning_rate: float
    weight_decay: float
    first_step: int


@dataclass(frozen=True)
class PlannedFile:
    """A file or folder that the run writes; `size` in bytes where it is known."""

    path: Path
    size: int | None
    exists: bool


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    Attributes:
        strategy: how it was started: "1 process", "ddp", "fsdp2", "zero2" or "zero3".
        memory: for each strategy with that many processes, per process.
        rows: that it trains on.
        rows_per_step: activations in an optimizer step: per-device batch x processes x accumulation.
        steps_per_epoch, total_steps: optimizer steps.
        subject_tokens: that the subject reads for a step, in the mean, in each stage; None where that is not known.
        resumes_from: the checkpoint that the run goes on from.
    """

    model: str
    layer: int
    num_layers: int
    processes: int
    strategy: str
    parameters: list[ParameterCount]
    memory: list[Memory]
    rows: ExpectedRows
    batch: int
    accumulation: int
    rows_per_step: int
    steps_per_epoch: int
    total_steps: int
    stages: list[PlannedStage]
    subject_tokens: list[float | None]
    rates: list[RateGroup]
    files: list[PlannedFile]
    resumes_from: str | None


def dry_run(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments) -> DryRun:
    """Plans a run: the settings of `recipe.run`, checked as there, and what they amount to.

    Raises:
        ValueError: for a user's mistake, as far as it shows without weights.
    """
    resume = checkpoint_to_resume(training_args)
    training_args.check_stages()
    check_recipe(args, training_args)
    # the best attention that is to be had is looked for in loading; here one that is asked for by name is tried
    named = None if args.attention == AUTO else args.attention
    subject = load_empty_subject(args.model, args.revision, args.dtype, named)
    lens = make_checked_lens(args, training_args, subject)
    name_run(training_args, dataset_of(args), args.model, lens.config.layer, resume)
    output_dir = Path(str(training_args.output_dir))
    summaries = read_checked_summaries(args, training_args)
    folder = Path(args.cache_dir) if args.cache_dir else output_dir / "data"
    reader = Reader(lens.subject, subject.tokenizer, args.model, subject.revision)
    rows = expected_rows(args, reader, folder, training_args.seed)
    processes = args.dry_run_processes or training_args.world_size
    rows_per_step = training_args.train_batch_size * processes * training_args.gradient_accumulation_steps
    rows_read = rows_of_epoch(rows, training_args) + len(summaries or ())
    steps_per_epoch = steps_in_epoch(rows_read, training_args, processes)
    total = training_args.max_steps
    if total <= 0:
        total = max(1, round_up(training_args.num_train_epochs * steps_per_epoch))
    timetable = Timetable(training_args, steps_per_epoch, total)
    stored = quantised_bytes(lens.subject.model, args.quantization)
    memory = memory_estimates(lens, training_args, processes, args.max_length, stored, args.is_streamed)
    return DryRun(
        model=args.model,
        layer=lens.config.layer,
        num_layers=lens.subject.stream.num_layers,
        processes=processes,
        strategy=launched_strategy(processes),
        parameters=parameter_counts(lens),
        memory=memory,
        rows=rows,
        batch=training_args.train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        rows_per_step=rows_per_step,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        stages=planned_stages(timetable, rows_per_step),
        subject_tokens=subject_tokens(args, training_args, rows, rows_per_step),
        rates=rate_groups(lens, timetable),
        files=list(planned_files(args, training_args, lens, rows, memory[0].optimizer, steps_per_epoch, total)),
        resumes_from=resume,
    )


def rows_of_epoch(rows: ExpectedRows, training_args: ConsistencyLensTrainingArguments) -> int:
    """Training rows of an epoch, without those that find no other row for their A'."""
    if rows.documents is None or not (training_args.needs_others() and training_args.pair_in_batch):
        return rows.train
    return num_paired_rows(rows.documents, training_args.positions_together)


def load_empty_subject(model: str, revision: str | None, dtype: str, attention: str | None = None) -> LoadedSubject:
    """A subject without weights: its architecture from the configuration, and its tokenizer.

    Raises:
        ValueError: as `load_subject_and_tokenizer`, but for what the weights tell.
    """
    revision = pinned_revision(model, revision)
    tokenizer = load_tokenizer(model, revision)
    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        # the buffers are real, for some are read while a lens is made
        with init_empty_weights(include_buffers=False):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
        empty.tie_weights()  # each was emptied by itself
    except (ImportError, OSError, ValueError) as error:
        raise not_loaded(model, error, attention) from error
    return LoadedSubject(empty.eval().requires_grad_(False), tokenizer, revision)


def round_up(steps: float) -> int:
    """The least whole number of steps that is no fewer."""
    return -int(-steps // 1)


def launched_strategy(processes: int) -> str:
    """What the run was launched with, as `accelerate launch` tells the processes that it starts."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    return "ddp" if processes > 1 else "1 process"


def parameter_counts(lens: ConsistencyLensModel) -> list[ParameterCount]:
    """Of subject, decoder and encoder, and of all of them, where what they share counts once."""
    subject: nn.Module = lens.subject.model
    own = {id(parameter) for parameter in subject.parameters()}
    parts = {"subject": subject, "decoder": lens.decoder, "encoder": lens.encoder}
    trees = {name: unique(module.parameters()) for name, module in parts.items()}
    trees["together"] = unique(parameter for tensors in trees.values() for parameter in tensors)
    result = []
    for name, tensors in trees.items():
        total = sum(tensor.numel() for tensor in tensors)
        trained = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
        shared = sum(tensor.numel() for tensor in tensors if id(tensor) in own and name in ("decoder", "encoder"))
        result.append(ParameterCount(name, total, trained, total - trained, shared))
    return result


def planned_stages(timetable: Timetable, rows_per_step: int) -> list[PlannedStage]:
    """The stages with their schedules at the corners.

    Raises:
        ValueError: if the stages before the last use up all steps.
    """
    args, stages = timetable.args, []
    for index, (start, end) in enumerate(timetable.bounds()):
        objective = args.parsed_stages()[index].objective
        schedules = {
            name: at_corners(resolved(timetable, name, index, start, end), start, end) for name in SETTINGS[objective]
        }
        schedules["learning rate"] = rate_factors(timetable, index, start, end)
        rows = rows_per_step * (args.group_size if objective == "policy_gradient" else 1)
        stages.append(PlannedStage(objective, start + 1, end, rows, schedules))
    return stages


def resolved(timetable: Timetable, name: str, index: int, start: int, end: int) -> ResolvedSchedule:
    """A schedule of the stage of that index, which lasts from step `start` to before `end`."""
    schedule = Schedule.parse(timetable.args.schedule_of(name, index))
    return schedule.resolve(timetable.steps_per_epoch, end - start)


def at_corners(schedule: ResolvedSchedule, start: int, end: int) -> list[tuple[int, float]]:
    """(step from 1, value) where a stage from step `start` to before `end` begins and ends, and at the corners."""
    corners = (schedule.warmup, schedule.warmup + schedule.hold, schedule.warmup + schedule.hold + schedule.change)
    steps = sorted({0, end - start - 1, *(corner for corner in corners if corner < end - start)})
    return [(start + step + 1, schedule(step)) for step in steps]


def rate_factors(timetable: Timetable, index: int, start: int, end: int) -> list[tuple[int, float]]:
    """(step from 1, factor on every learning rate) at the corners of a stage."""
    args = timetable.args
    if args.learning_rate_schedule is not None:
        schedule = resolved(timetable, "learning_rate_schedule", index, start, end)
        return [(step, timetable.rate_factor(step - 1)) for step, _ in at_corners(schedule, start, end)]
    warmup = args.get_warmup_steps(timetable.total_steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    settings: Any = args.lr_scheduler_kwargs or None
    scheduler: Any = get_scheduler(args.lr_scheduler_type, optimizer, warmup, timetable.total_steps, settings)
    steps = sorted({start, end - 1, warmup} if start <= warmup < end else {start, end - 1})
    return [(step + 1, scheduler.lr_lambdas[0](step)) for step in steps]


def rate_groups(lens: ConsistencyLensModel, timetable: Timetable) -> list[RateGroup]:
    """The parameter groups that the optimizer will have.

    Raises:
        ValueError: if one would never train.
    """
    args = timetable.args
    starts = Unfreezing.resolve(args.unfreeze or [], timetable.steps_per_epoch, timetable.total_steps).starts
    return [
        RateGroup(
            group["name"],
            sum(parameter.numel() for parameter in group["params"]),
            group["lr"],
            group["weight_decay"],
            1 + (of_group(starts, group["name"]) or (0, 0))[0],
        )
        for group in parameter_groups(lens, args)
    ]


def subject_tokens(
    args: RecipeArguments, training_args: ConsistencyLensTrainingArguments, rows: ExpectedRows, rows_per_step: int
) -> list[float | None]:
    """Tokens of contexts that the subject reads for a step of each stage; None where their length is not known."""
    context = rows.context_tokens
    reads = [reads_contexts(args, training_args, stage.objective) for stage in training_args.parsed_stages()]
    return [0.0 if not read else None if context is None else rows_per_step * context for read in reads]


def reads_contexts(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments, objective: str) -> bool:
    """Whether the subject reads the contexts of a batch: for their activations, or to judge reconstructions."""
    if args.activations == "on_the_fly":
        return True
    if objective == "gumbel":
        return training_args.has_weight("kl")
    return objective == "policy_gradient" and training_args.reward == "-kl"


def planned_files(
    args: RecipeArguments,
    training_args: ConsistencyLensTrainingArguments,
    lens: ConsistencyLensModel,
    rows: ExpectedRows,
    states: int,
    steps_per_epoch: int,
    total_steps: int,
) -> Iterator[PlannedFile]:
    """What the run writes: cache, checkpoints, lens, figures. `states` are the optimizer's, in bytes."""
    output_dir = Path(str(training_args.output_dir))
    if rows.cache is not None:
        number = {"float16": 2, "float32": 4}[args.cache_dtype]
        row = lens.subject.stream.width * number + BYTES_PER_TOKEN * (rows.context_tokens or 0) + BYTES_PER_ROW
        size = None if rows.is_cached else round((rows.train + rows.held_out) * row)
        yield PlannedFile(rows.cache, size, rows.is_cached)
    weights = num_bytes(lens.trained_tensors().values())
    for name in checkpoint_names(training_args, steps_per_epoch, total_steps):
        path = output_dir / name
        yield PlannedFile(path, weights + states, path.is_dir())
    for name in (*LENS_FILES, *RUN_FILES):
        path = output_dir / name
        yield PlannedFile(path, weights if name == "model.safetensors" else None, path.is_file())


def checkpoint_names(args: ConsistencyLensTrainingArguments, steps_per_epoch: int, total_steps: int) -> list[str]:
    """The checkpoints that are there in the end, at most: which are the best will only be known then."""
    steps = checkpoint_steps(args, steps_per_epoch, total_steps)
    last = args.save_total_limit or (1 if args.keep_best else len(steps))
    best = min(args.keep_best, len(steps[:-last]))
    return [*(f"checkpoint-<best {rank}>" for rank in range(1, best + 1)), *(f"checkpoint-{n}" for n in steps[-last:])]


def checkpoint_steps(args: ConsistencyLensTrainingArguments, steps_per_epoch: int, total_steps: int) -> list[int]:
    """The steps that end with a checkpoint."""
    if args.save_strategy not in ("steps", "epoch"):
        return []
    every = steps_per_epoch
    if args.save_strategy == "steps":
        every = int(args.save_steps) if args.save_steps >= 1 else round_up(args.save_steps * total_steps)
    # without a number of steps the end alone is saved
    return sorted({*range(every, total_steps + 1, every), total_steps}) if every else [total_steps]
