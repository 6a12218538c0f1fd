"""The steps of a pipeline as processes: in order in the foreground, or as jobs of a Slurm cluster."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .pipeline import Step
from .step_results import clear, settings_file

# Beside this file, for who installs the package has no examples; examples/slurm/train.sbatch is a link to it.
TRAIN_SCRIPT = Path(__file__).with_name("train.sbatch")
# What `sbatch --parsable` answers: the job's number, and the cluster's name where there are several.
ANSWER = re.compile(r"(\d+)(;\S+)?")


class StepError(Exception):
    """A step that failed, or a job that could not be submitted."""


@dataclass
class ResourceArguments:
    """What the steps run on."""

    nodes: int = field(default=1, metadata={"help": "Nodes of the training; the other steps take one."})
    gpus_per_node: int = field(
        default=1, metadata={"help": "GPUs of training and caching on a node, a process for each; 0: none."}
    )
    cpus_per_node: int | None = field(
        default=None, metadata={"help": "CPU cores of a step on a node; default: 8 for each of its GPUs, at least 8."}
    )
    time: str | None = field(default=None, metadata={"help": "Time limit of each job, such as 24:00:00."})
    partition: str | None = field(default=None, metadata={"help": "As sbatch has it."})
    account: str | None = field(default=None, metadata={"help": "As sbatch has it."})
    constraint: str | None = field(default=None, metadata={"help": "As sbatch has it, such as h100."})
    nodelist: str | None = field(default=None, metadata={"help": "Nodes that the training must have."})
    sbatch_args: str = field(
        default="", metadata={"help": "More options of sbatch, in one string: --sbatch_args='--qos=high --mem=0'."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "File of accelerate launch, as in examples/accelerate, for the training; default: DDP."},
    )
    logs: str | None = field(default=None, metadata={"help": "Folder of the jobs' output; default <output_dir>/logs."})

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_node", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.accelerate_config is not None and not Path(self.accelerate_config).is_file():
            raise ValueError(f"accelerate_config: no file at {self.accelerate_config!r}; pass another")
        try:
            shlex.split(self.sbatch_args)
        except ValueError as error:
            raise ValueError(f"sbatch_args: cannot read {self.sbatch_args!r} ({error}); mind the quotes") from error

    @property
    def processes(self) -> int:
        """Of training and caching on a node."""
        return max(1, self.gpus_per_node)

    def gpus_of(self, step: str) -> int:
        """GPUs on a node."""
        return {"tokenize": 0, "eval": min(1, self.gpus_per_node)}.get(step, self.gpus_per_node)

    def log_of(self, step: str, job: str, folder: Path) -> Path:
        """What a job of the run in `folder` prints to."""
        return (Path(self.logs) if self.logs else folder / "logs") / f"{step}-{job}.log"


@dataclass(frozen=True)
class Job:
    """A step that is submitted."""

    step: str
    number: str
    after: str | None
    """The job that it waits for."""
    log: Path


def write_settings(folder: Path, step: Step) -> Path:
    """Writes the settings of a step for its `--config`: the recipe may change before a job starts."""
    import yaml

    from ..atomic_write import write_text

    file = settings_file(folder, step.name)
    write_text(file, yaml.safe_dump(step.settings, sort_keys=False, allow_unicode=True))
    return file


def command_here(step: Step, folder: Path, resources: ResourceArguments) -> list[str]:
    """The command of a step on this machine; training and caching may take several processes."""
    words = [step.name, "--config", str(settings_file(folder, step.name))]
    if step.name == "train" and resources.accelerate_config is not None:
        launch = ["-m", "accelerate.commands.launch", "--config_file", resources.accelerate_config]
        launch += ["--num_processes", str(resources.processes)]
    elif step.name in ("train", "cache") and resources.processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(resources.processes)]
    else:
        launch = []
    return [sys.executable, *launch, "-m", "consistency_lens", *words]


def run_steps(
    steps: Sequence[Step], folder: Path, resources: ResourceArguments, announce: Callable[[Step], None]
) -> None:
    """Runs steps one after the other in the foreground.

    Args:
        folder: of the run.
        announce: called with each step before it starts.

    Raises:
        StepError: if a step fails, or training was interrupted; those after it do not start.
    """
    from ..training.interruption import INTERRUPTED_FILE

    for step in steps:
        write_settings(folder, step)
        announce(step)
        code = run_in_foreground(command_here(step, folder, resources))
        if code != 0:
            what = f"by the signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise StepError(f"{step.name}: ended {what}; mend what it says above, and the same command goes on here")
        if step.name == "train" and (folder / INTERRUPTED_FILE).exists():
            raise StepError("train: interrupted, with a checkpoint saved; the same command with --resume goes on")


def run_in_foreground(command: Sequence[str]) -> int:
    """The exit code of a command; SIGTERM is passed on to it, so that training can save."""
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal has told the command too
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def sbatch_command(
    step: Step, folder: Path, resources: ResourceArguments, after: str | None
) -> tuple[dict[str, str], list[str]]:
    """The command that submits a step, and what it wants in its environment.

    Args:
        folder: of the run.
        after: the number of the job that must have succeeded before.
    """
    words = ["sbatch", "--parsable", f"--job-name={step.name}-{folder.resolve().name}"]
    words += [f"--output={resources.log_of(step.name, '%j', folder)}"]
    if after is not None:
        # a job whose predecessor failed would stay in the queue for ever
        words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    gpus, is_training = resources.gpus_of(step.name), step.name == "train"
    options = {
        "nodes": resources.nodes if is_training else 1,
        # said in any case where the script says another number
        "gpus-per-node": gpus if gpus or is_training else None,
        "cpus-per-task": resources.cpus_per_node or 8 * max(1, gpus),
        "time": resources.time,
        "partition": resources.partition,
        "account": resources.account,
        "constraint": resources.constraint,
        "nodelist": resources.nodelist if is_training else None,
    }
    words += [f"--{name}={value}" for name, value in options.items() if value is not None]
    words += shlex.split(resources.sbatch_args)
    if not is_training:
        return {}, [*words, f"--wrap=exec {shlex.join(command_here(step, folder, resources))}"]
    environment = {"OUTPUT_DIR": str(folder), "PYTHON": sys.executable}
    if resources.accelerate_config is not None:
        environment["ACCELERATE_CONFIG"] = resources.accelerate_config
    return environment, [*words, str(TRAIN_SCRIPT), "--config", str(settings_file(folder, step.name))]


def submit_steps(steps: Sequence[Step], folder: Path, resources: ResourceArguments) -> list[Job]:
    """Submits a job for each step, each to start when the one before has succeeded.

    Raises:
        StepError: if sbatch fails or answers something else than a number; the message has the jobs that are out.
    """
    from ..atomic_write import write_json

    resources.log_of("", "", folder).parent.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for step in steps:
        write_settings(folder, step)
        after = jobs[-1].number if jobs else None
        environment, command = sbatch_command(step, folder, resources, after)
        try:
            number = submit(command, environment)
        except StepError as error:
            out = " ".join(job.number for job in jobs)
            rest = f"jobs {out} are submitted already; take them back: scancel {out}" if jobs else "none is submitted"
            raise StepError(f"{step.name}: {error}; {rest}") from error
        jobs.append(Job(step.name, number, after, resources.log_of(step.name, number, folder)))
        write_json(jobs_file(folder), {job.step: job.number for job in jobs})
    return jobs


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The number of the job that a sbatch command makes.

    Raises:
        StepError: if it makes none.
    """
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or "nothing"
        raise StepError(f"sbatch ended with exit code {done.returncode} and said: {said}")
    answer = ANSWER.fullmatch(done.stdout.strip())
    if answer is None:
        raise StepError(f"sbatch answered {done.stdout.strip()!r} instead of the number of a job")
    return answer[1]


def jobs_file(folder: Path) -> Path:
    """Where the numbers of the jobs of a run are kept."""
    return folder / "steps" / "jobs.json"


def check_queue(folder: Path) -> None:
    """ValueError if jobs of an earlier submit for this run are still in the queue: two would write the same files."""
    if not jobs_file(folder).is_file() or shutil.which("squeue") is None:
        return
    numbers = list(json.loads(jobs_file(folder).read_text(encoding="utf-8")).values())
    # of jobs that are gone it says nothing, or that there are none
    command = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(numbers)}"]
    queued = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if queued:
        raise ValueError(
            f"output_dir: jobs {' '.join(queued)} of an earlier submit for {str(folder)!r} are in the queue; wait for "
            f"them, or take them back: scancel {' '.join(queued)}"
        )


def clear_steps(steps: Sequence[Step], force: str | None) -> None:
    """Removes what is to be made again."""
    from .pipeline import STEPS

    for step in steps:
        if force is not None and STEPS.index(step.name) >= STEPS.index(force):
            clear(step)
