"""One run in a tracker, however often it is resumed: its name and id lie in its folder and in every checkpoint."""

import importlib
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic_write import write_json

RUN_FILE = "tracked_run.json"
TRACKERS = ("wandb", "trackio")
# What is told of the job, and where the schedulers of clusters (Slurm, LSF, PBS) say it.
JOB_VARIABLES = {
    "job_id": ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID"),
    "job_name": ("SLURM_JOB_NAME", "LSB_JOBNAME", "PBS_JOBNAME"),
    "nodes": ("SLURM_JOB_NODELIST", "LSB_HOSTS"),
    "restarts": ("SLURM_RESTART_COUNT",),
}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows a run by; trackio goes by the name, wandb by the id."""

    name: str | None
    id: str


def read_run(*folders: Path) -> TrackedRun | None:
    """The run that the first of the folders belongs to which says so; None if none does."""
    for folder in folders:
        path = folder / RUN_FILE
        if path.is_file():
            return TrackedRun(**json.loads(path.read_text(encoding="utf-8")))
    return None


def write_run(run: TrackedRun, folder: Path) -> None:
    """Writes what `read_run` reads."""
    write_json(folder / RUN_FILE, asdict(run))


def identify_run(name: str | None, resume: Path | None) -> TrackedRun:
    """The run that a training goes on with, or a new one; `WANDB_RUN_ID` wins over the id that a checkpoint holds.

    Args:
        name: that was asked for.
        resume: the checkpoint to go on from.
    """
    before = None if resume is None else read_run(resume, resume.parent)
    run_id = os.environ.get("WANDB_RUN_ID") or (before.id if before is not None else uuid.uuid4().hex[:8])
    return TrackedRun(name or (before.name if before is not None else None), run_id)


def continue_in_wandb(run: TrackedRun) -> None:
    """Opens the run in wandb, so that transformers' own callback finds it open and logs to it."""
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is None:
        project = os.environ.get("WANDB_PROJECT", "huggingface")  # what transformers takes
        wandb.init(project=project, name=run.name, id=run.id, resume="allow")


def machine_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """The host, and the job and nodes that the scheduler of a cluster names."""
    facts = {"host": socket.gethostname()}
    for fact, variables in JOB_VARIABLES.items():
        said = [environment[name] for name in variables if environment.get(name)]
        facts |= {fact: said[0]} if said else {}
    return facts


class DescribeMachine(TrainerCallback):
    """Writes the host and the cluster's job into the configuration of the run, in those trackers that are on.

    It has to stand behind transformers' own callbacks, which open the runs.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        for name in TRACKERS:
            if name in (args.report_to or ()):
                tracker: Any = importlib.import_module(name)
                tracker.config.update({"machine": machine_facts(os.environ)}, allow_val_change=True)
