"""Settings that cannot go together: each such combination is one error, before any long work.

What concerns one setting alone is checked where it is declared.
"""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from ..checkpoints.run_folder import check_folder
from ..configuration_consistency_lens import ConsistencyLensConfig
from ..data.activation_source import SourceRows
from ..data.streaming import StreamedActivations
from ..data.subject_loading import check_loading
from ..evaluation.evaluator import FIGURES, WORTH
from ..modeling_consistency_lens import ConsistencyLensModel
from ..quantised import is_quantised
from ..schedules import Schedule, parse_duration
from .arguments import SCHEDULED, ConsistencyLensTrainingArguments
from .publishing_trainer import WITH_CHECKPOINTS
from .recipe_arguments import RecipeArguments
from .sharding_arguments import check_sharding, spread_by
from .unfreezing import parse_unfreeze

INTERIM_CONTROLS = ("mean", "shuffled")
"""Controls of the evaluations that a recipe makes during training."""


def check_recipe(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments) -> None:
    """Checks what is known before the subject is loaded.

    Raises:
        ValueError: for settings that cannot go together, or a folder with what would be written over.
    """
    check_training(training_args)
    check_metric(training_args.metric_for_best_model)
    if training_args.output_dir_given:
        check_folder(Path(str(training_args.output_dir)), ConsistencyLensConfig.model_type)
    check_loading(args.dtype, args.quantization, training_args.device, None, args.attention)
    if args.quantization is not None:
        if args.clones == "full":
            raise ValueError(
                f"clones: got full, but the {args.quantization} weights of quantization cannot be trained; set clones "
                "to lora or frozen, or leave quantization out"
            )
        check_quantised(training_args, f"quantization: got {args.quantization}")
    if args.attention == "flex_attention" and training_args.device.type == "cpu":
        raise ValueError("attention: flex_attention has no gradient on a CPU; set attention to auto")
    if args.is_streamed or args.summaries is not None:
        check_order_is_default(training_args)
    if args.is_streamed:
        check_stream(training_args)
    elif training_args.needs_others() and training_args.pair_in_batch:
        check_pairs(training_args)


def interim_figures() -> list[str]:
    """What the evaluations of a recipe give, by the names that `metric_for_best_model` has for them."""
    of_controls = (f"{control}_{name}" for control in INTERIM_CONTROLS if control != "mean" for name in WORTH)
    return ["loss", *FIGURES, *of_controls]


def check_metric(metric: str | None) -> None:
    """Checks that `metric_for_best_model` is one of them."""
    if metric is not None and metric.removeprefix("eval_") not in interim_figures():
        raise ValueError(
            f"metric_for_best_model: no evaluation gives {metric!r}; it is one of {', '.join(interim_figures())}"
        )


def check_lens(lens: ConsistencyLensModel, args: ConsistencyLensTrainingArguments) -> None:
    """Checks what is known of a lens that is to be trained.

    Raises:
        ValueError: for settings that cannot go together.
    """
    check_training(args)
    base = lens.decoder.base
    if is_quantised(base):
        check_quantised(args, "the subject is quantised")
    if args.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: {type(base).__name__} cannot recompute its blocks; set it to false")


def check_training(args: ConsistencyLensTrainingArguments) -> None:
    """Checks the training arguments by themselves.

    Raises:
        ValueError: for settings that cannot go together.
    """
    check_sharding(args, args.share_weights)
    spread = spread_by(args)
    settings = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(settings, dict) and settings.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs: use_reentrant=True loses gradients of adapters behind frozen weights; "
            "leave it out"
        )
    if args.push_to_hub and args.deepspeed_plugin is not None and args.hub_strategy in WITH_CHECKPOINTS:
        raise ValueError(
            f"hub_strategy: got {HubStrategy(args.hub_strategy).value}, but checkpoints of DeepSpeed hold pickles, "
            "which are never published; set it to every_save or end"
        )
    if args.torch_compile and (spread is not None or args.deepspeed_plugin is not None):
        raise ValueError(
            f"torch_compile: compiles weights that lie whole in each process, got {spread or 'DeepSpeed'}; set it "
            "to false, or train with DDP"
        )
    engine = "DeepSpeed" if args.deepspeed_plugin is not None else spread
    if engine is not None and args.ema_decay > 0:
        raise ValueError(f"ema_decay: cannot average tensors that {engine} spreads over processes; set it to 0")
    for name in ("unfreeze", "group_max_grad_norm"):
        if engine == "DeepSpeed" and getattr(args, name):
            raise ValueError(f"{name}: DeepSpeed clips and steps by itself, for all groups at once; leave it out")
    if args.save_only_model and args.ema_decay > 0:
        raise ValueError("save_only_model: its checkpoints leave out the averages of ema_decay; set one of them off")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: would round the trained tensors, which stay in float32; set {name[:4]} instead, which "
                "evaluates in half precision too"
            )


def check_quantised(args: ConsistencyLensTrainingArguments, what: str) -> None:
    """Checks that weights of 8 or 4 bits are not to be spread over processes; `what` is how an error begins.

    Raises:
        ValueError: if they are.
    """
    spread = spread_by(args)
    if spread is not None:
        raise ValueError(f"{what}, but {spread} cannot spread quantised weights; train with DDP or ZeRO-2")


def check_stream(args: ConsistencyLensTrainingArguments) -> None:
    """Checks settings for rows that are streamed from the Hub.

    Raises:
        ValueError: for workers that load them.
    """
    if args.dataloader_num_workers > 0:
        raise ValueError(
            f"dataloader_num_workers: got {args.dataloader_num_workers}, but a stream loads ahead by itself, and each "
            "worker would download it whole; set it to 0"
        )


def check_rows(rows: Any, args: ConsistencyLensTrainingArguments) -> None:
    """Checks training rows: streamed ones, and those of which it is not known how many they are (an
    `IterableDataset`), cannot have all settings.

    Raises:
        ValueError: for settings that they cannot go with.
    """
    if isinstance(rows, StreamedActivations):
        check_stream(args)
    if rows is not None and not isinstance(rows, SourceRows):
        check_order_is_default(args)
    if pairs_in_batch(rows, args):
        check_pairs(args)
    else:
        check_others("train_dataset", rows, args)
    if rows is None or has_length(rows):
        return
    what = "the training rows have no known number"
    if args.max_steps <= 0:
        raise ValueError(f"max_steps: got {args.max_steps}, but {what}; set it to the steps of the run")
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps: got {args.gradient_accumulation_steps}, but {what}, so that the last step "
            "of a pass may have fewer batches; set it to 1 and raise per_device_train_batch_size"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ValueError(f"{name}: got epoch, but {what}; set it to steps")
    check_durations(args)


def check_order_is_default(args: ConsistencyLensTrainingArguments) -> None:
    """Checks settings for rows that are not known before they are read.

    Raises:
        ValueError: for an order that needs to know them.
    """
    for name, off in (("positions_together", 1), ("length_window", 0)):
        if getattr(args, name) > off:
            raise ValueError(
                f"{name}: got {getattr(args, name)}, but only rows of a cache, or read on the fly, are known before "
                f"they are read; set it to {off} for streamed rows, summaries and data sets of your own"
            )


def check_others(what: str, rows: Any, args: ConsistencyLensTrainingArguments) -> None:
    """Checks that rows have an A' where a stage takes one; those of data sets of one's own show it when they are read.

    Raises:
        ValueError: if they have none.
    """
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        stream = isinstance(part, StreamedActivations) and part.pair_seed is None
        if args.needs_others() and (stream or isinstance(part, SourceRows) and part.partners is None):
            raise ValueError(
                f"{what}: delta_residual={args.delta_residual} takes a second activation A', but these rows have "
                "none; make them with a pair_seed"
            )


def pairs_in_batch(rows: Any, args: ConsistencyLensTrainingArguments) -> bool:
    """Whether the A' of a training row is that of another row of its batch: rows with an A' of their own keep it."""
    known = isinstance(rows, SourceRows) and rows.partners is None
    return known and args.needs_others() and args.pair_in_batch


def check_pairs(args: ConsistencyLensTrainingArguments) -> None:
    """Checks settings for rows that are each other's A'.

    Raises:
        ValueError: for batches that would divide a pair.
    """
    mend = "or set pair_in_batch to false"
    if args.train_batch_size % 2:
        raise ValueError(
            f"per_device_train_batch_size: got {args.train_batch_size}, but rows are each other's A' in pairs "
            f"(delta_residual={args.delta_residual}); make it even, {mend}"
        )
    if args.auto_find_batch_size:
        raise ValueError(f"auto_find_batch_size: may come to batches that divide pairs of rows; leave it out, {mend}")
    accelerator: Any = args.accelerator_config
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator, name):
            raise ValueError(f"accelerator_config: {name} may divide pairs of rows; leave it out, {mend}")


def check_durations(args: ConsistencyLensTrainingArguments) -> None:
    """Checks that no stage, schedule or unfreezing counts epochs.

    Raises:
        ValueError: if one does, naming the setting.
    """
    setting = "stages"
    try:
        args.stage_starts(None, args.max_steps)
        for setting in SCHEDULED:
            for text in getattr(args, setting) or []:
                Schedule.parse(text).resolve(None, args.max_steps)
        setting = "unfreeze"
        for unfreeze in parse_unfreeze(args.unfreeze or []).values():
            for duration in (unfreeze.start, unfreeze.warmup):
                parse_duration(duration, None, args.max_steps)
    except ValueError as error:
        raise error if str(error).startswith(setting) else ValueError(f"{setting}: {error}") from error


def has_length(rows: Any) -> bool:
    """Whether it is known how many rows there are."""
    try:
        len(rows)
    except TypeError:
        return False
    return True
