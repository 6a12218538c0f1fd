"""`consistency-lens submit`: the whole pipeline of a recipe, as jobs of a Slurm cluster or in the foreground."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .jobs import ResourceArguments

if TYPE_CHECKING:
    from rich.console import Console

    from .jobs import Job
    from .pipeline import Step


@dataclass
class SubmitArguments(ResourceArguments):
    """Which steps run, and where. Every argument of `consistency-lens train` is understood beside these."""

    local: bool = field(default=False, metadata={"help": "Run here in the foreground, though there is a cluster."})
    dry_run: bool = field(default=False, metadata={"help": "Print the steps with their commands, and do nothing."})
    resume: bool = field(
        default=False, metadata={"help": "Training goes on from its last checkpoint, if there is one."}
    )
    force: str | None = field(
        default=None,
        metadata={"help": "tokenize, cache, train or eval: do this step and those after it again, though done."},
    )

    def __post_init__(self) -> None:
        from .pipeline import STEPS

        if self.force is not None and self.force not in STEPS:
            raise ValueError(f"force must be one of {', '.join(STEPS)}, got {self.force!r}")
        super().__post_init__()


def main(argv: Sequence[str] | None = None) -> int:
    """Submits or runs the steps that are not done; prints them. Returns the exit code."""
    import shutil

    from .command import FAILED, run_command
    from .jobs import StepError, check_queue, clear_steps, run_steps, submit_steps
    from .parser import known_names
    from .pipeline import RUNS, plan, read_recipe

    def work(console: "Console") -> None:
        arguments, config, flags = read_arguments(argv)
        recipe = read_recipe(flags, config, known_names((SubmitArguments,)))
        folder = recipe.output_dir
        on_cluster = not arguments.local and shutil.which("sbatch") is not None
        check_place(arguments, on_cluster)
        if on_cluster:
            check_queue(folder)
        steps = plan(recipe, arguments.resume, arguments.force)
        pending = [step for step in steps if step.state == RUNS]
        print_steps(console, steps)
        if arguments.dry_run:
            print_commands(console, pending, folder, arguments, on_cluster)
            return
        if not pending:
            console.print("all steps are done; --force <step> does one and those after it again")
            return
        clear_steps(pending, arguments.force)
        if on_cluster:
            print_jobs(console, submit_steps(pending, folder, arguments))
        else:
            run_steps(pending, folder, arguments, lambda step: print(f"== {step.name}", flush=True))

    return run_command(work, {StepError: FAILED})


def read_arguments(argv: Sequence[str] | None) -> tuple[SubmitArguments, Mapping[str, object], list[str]]:
    """The arguments of this command, what the recipe's file holds, and the flags that are the recipe's.

    Raises:
        ValueError: for a file that is not there, or an argument of another kind.
    """
    from .parser import check_keys, known_names, parse_given, read_yaml, split_config
    from .pipeline import section_of

    path, flags = split_config(argv)
    config = {} if path is None else read_yaml(path)
    section = section_of(config, "submit")
    check_keys("the section 'submit' of the recipe", section, known_names((SubmitArguments,)))
    given, rest = parse_given((SubmitArguments,), flags, section, "submit")
    return SubmitArguments(**given), config, rest


def check_place(arguments: SubmitArguments, on_cluster: bool) -> None:
    """ValueError for what only a cluster has, where the steps run here."""
    if on_cluster:
        return
    reason = "--local runs here" if arguments.local else "there is no sbatch here"
    if arguments.nodes > 1:
        raise ValueError(f"nodes: got {arguments.nodes}, but {reason}; leave it out, or submit on a cluster")


def print_steps(console: "Console", steps: Sequence["Step"]) -> None:
    """A table of the steps."""
    from ..evaluation.report import rich_table

    rows = [(step.name, step.state, str(step.result)) for step in steps]
    console.print(rich_table(("step", "state", "result"), rows))


def print_commands(
    console: "Console", steps: Sequence["Step"], folder: Path, resources: ResourceArguments, on_cluster: bool
) -> None:
    """The command of each step, and the settings that it would read."""
    import yaml

    from .jobs import command_here, sbatch_command
    from .step_results import settings_file

    before: str | None = None
    for step in steps:
        environment: dict[str, str] = {}
        command = command_here(step, folder, resources)
        if on_cluster:
            environment, command = sbatch_command(step, folder, resources, before)
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()] + [shlex.join(command)]
        settings = yaml.safe_dump(step.settings, sort_keys=False, allow_unicode=True)
        text = f"\n{' '.join(words)}\n# {settings_file(folder, step.name)}:\n{settings}"
        console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)
        before = f"<{step.name}>"


def print_jobs(console: "Console", jobs: Sequence["Job"]) -> None:
    """A table of the jobs, and how to look at them."""
    from ..evaluation.report import rich_table

    rows = [(job.step, job.number, job.after or "", str(job.log)) for job in jobs]
    console.print(rich_table(("step", "job", "after", "log"), rows))
    numbers = [job.number for job in jobs]
    console.print(
        f"Look at them: squeue --jobs={','.join(numbers)}; take them back: scancel {' '.join(numbers)}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
