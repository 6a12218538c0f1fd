"""Which checkpoint a run goes on from, and whether it is still the same run."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from .manifest import tear_in
from .states import checkpoints_in

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
# Settings that a resumed run may change without becoming another run: names, or how they begin.
FREE = (
    "output_dir", "run_name", "report_to", "project", "trackio", "log", "save_", "eval_", "do_", "hub_", "push_to_hub",
    "disable_tqdm", "resume_from_checkpoint", "restore_callback", "per_device_eval", "batch_eval", "prediction_loss",
    "include_", "metric_for_best", "greater_is_better", "load_best", "dataloader_num", "dataloader_pin", "debug",
    "dataloader_prefetch", "dataloader_persistent", "skip_memory", "torch_empty_cache", "ddp_", "max_nonfinite_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "cache_dir", "num_samples",
    "sample_steps", "interim_", "tracked_", "keep_best", "early_stopping",
)  # fmt: skip


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; None to start anew.

    "true" is the newest whole one of the run; "auto" the same, or a new start where there is none, as a job that is
    requeued needs it. To be called by every process of the run.

    Raises:
        ValueError: if there is none, or if the one that is named is not whole.
    """
    wanted, output_dir = args.resume_from_checkpoint, Path(str(args.output_dir))
    if wanted is None or str(wanted).lower() == "false":
        warn_of_others(args, output_dir)
        return None
    if str(wanted).lower() in ("true", "auto"):
        found, passed_over = newest_whole(args, output_dir)
        if found is None and str(wanted).lower() == "true":
            why = f" is whole ({'; '.join(passed_over)})" if passed_over else ""
            raise ValueError(
                f"resume_from_checkpoint: no checkpoint in {str(output_dir)!r}{why}; leave it out to start anew"
            )
        return found
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint: {wanted!r} is no checkpoint folder; pass one named checkpoint-<step>"
        )
    tear = tear_in(Path(wanted), args)
    if tear is not None:
        raise ValueError(
            f"resume_from_checkpoint: {str(wanted)!r} is not whole ({tear}); pass true for the newest that is"
        )
    warn_of_later(args, Path(wanted), output_dir)
    return str(wanted)


def newest_whole(args: TrainingArguments, output_dir: Path) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint of a run, None if there is none; and what is wrong with those after it."""
    folders: list[Any] = [list(checkpoints_in(output_dir).values())[::-1]]
    if args.world_size > 1:
        broadcast_object_list(folders)
    passed_over: list[str] = []
    for folder in folders[0]:
        tear = tear_in(folder, args)
        if tear is None:
            return str(folder), passed_over
        passed_over.append(f"{folder.name}: {tear}")
        if args.process_index == 0:
            logger.warning("%s is not whole (%s); taking the one before it", folder, tear)
    return None, passed_over


def warn_of_others(args: TrainingArguments, output_dir: Path) -> None:
    """A later resume could take a checkpoint of an earlier run for one of the run that starts now."""
    before = list(checkpoints_in(output_dir).values())
    if before and args.process_index == 0:
        logger.warning(
            "%s has checkpoints of an earlier run, up to %s, which a resume would take for this run's; pass "
            "--resume_from_checkpoint true to go on from there, or another output_dir",
            output_dir,
            before[-1].name,
        )


def warn_of_later(args: TrainingArguments, resumed: Path, output_dir: Path) -> None:
    """As `warn_of_others`, of a run that goes back to an earlier checkpoint of its own."""
    *_, newest = [None, *checkpoints_in(output_dir).values()]
    same_run = resumed.resolve().parent == output_dir.resolve()
    if newest is not None and same_run and newest.resolve() != resumed.resolve() and args.process_index == 0:
        logger.warning(
            "%s has checkpoints after %s, up to %s, which true and auto would take for this run's; remove them, or "
            "pass another output_dir",
            output_dir,
            resumed.name,
            newest.name,
        )


def check_same_run(folder: Path, progress: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Compares a run that goes on with what its checkpoint says.

    Args:
        folder: the checkpoint.
        progress: where the run is, by the settings of now; the same was written into the checkpoint.
        settings: training and recipe arguments of now, as JSON takes them.

    Returns:
        What is different, and keeps the run from being exactly what it would have been; one line each.

    Raises:
        ValueError: if the run cannot go on with these settings.
    """
    path = folder / PROGRESS_FILE
    if not path.is_file():
        raise ValueError(f"checkpoint: {path.name} is missing in {str(folder)!r}; resume from an earlier one")
    then: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if then["stage"] != progress["stage"]:
        raise ValueError(
            f"stages: step {then['step']} lay in stage {then['stage']} in {str(folder)!r}, and lies in stage "
            f"{progress['stage']} by the settings of now; set stages, max_steps and num_train_epochs as they were"
        )
    for name in sorted(set(then["kept"]) ^ set(progress["kept"])):
        before, now = ("on", "off") if name in then["kept"] else ("off", "on")
        raise ValueError(f"{name}: it is {now}, but was {before} in {str(folder)!r}; set it as it was")
    changed = [
        f"{name.replace('_', ' ')} {progress[name]} (were {then[name]}): {consequence}"
        for name, consequence in CONSEQUENCES.items()
        if then[name] != progress[name]
    ]
    return changed + [
        f"{name} {now!r} (was {before!r})" for name, before, now in differences(settings_in(folder), settings)
    ]


CONSEQUENCES = {
    "processes": "random states are not all restored, and sums are rounded otherwise",
    "rows_per_step": "some rows of this epoch are read twice, or not at all",
    "training_rows": "the order of the rows is another",
}


def settings_in(folder: Path) -> dict[str, Any]:
    """Training and recipe arguments of a checkpoint, as far as they are there."""
    settings: dict[str, Any] = {}
    for name, key in (("provenance.json", "recipe"), ("training_arguments.json", None)):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            settings |= content if key is None else content.get(key, {})
    return settings


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, before, now) of every setting that counts and is another; settings that only one side knows are new."""
    counts = [name for name in then if name in now and not name.startswith(FREE)]
    return [(name, then[name], now[name]) for name in counts if then[name] != now[name]]
