"""The tables of `consistency-lens train --dry_run`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

    from ..training.dry_run import DryRun, PlannedStage
    from ..training.memory_estimate import Memory

UNKNOWN = "not known"
ESTIMATE = (
    "Activations are an estimate. On top come the device's runtime, the allocator's gaps, the strategies' buckets, "
    "and the passes that make the cache and the evaluation."
)


def dry_run_tables(plan: "DryRun") -> "Group":
    """Parameters, memory, steps, schedules, learning rates and files of a planned run."""
    from rich.console import Group
    from rich.text import Text

    from ..evaluation.report import rich_table

    def titled(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[Any]:
        return [Text(f"\n{title}"), rich_table(columns, rows)]

    head = f"{plan.model}, layer {plan.layer} of 0..{plan.num_layers - 1}; dry run: nothing is loaded or written"
    memory = f"Memory of a process, {plan.processes} in all (launched: {plan.strategy})"
    return Group(
        Text(head),
        *titled("Parameters", ("part", "all", "trained", "frozen", "the subject's own"), parameter_rows(plan)),
        *titled(memory, ("strategy", "weights", "gradients", "optimizer", "activations", "total"), memory_rows(plan)),
        Text(ESTIMATE),
        *titled("Steps", ("", ""), step_rows(plan)),
        *titled("Stages", ("objective", "first step", "last step", "texts a step", "subject's tokens a step"),
                stage_rows(plan)),
        *titled("Schedules, at their corners", ("stage", "setting", "step: value"), schedule_rows(plan)),
        *titled("Learning rates, before the factor of the stage",
                ("group", "parameters", "rate", "weight decay", "from step"), rate_rows(plan)),
        *titled("Files", ("path", "size", "there already"), file_rows(plan)),
    )  # fmt: skip


def parameter_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """Numbers in each part."""
    return [(p.part, *(f"{n:,}" for n in (p.total, p.trained, p.frozen, p.shared))) for p in plan.parameters]


def memory_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """Bytes of a process under each strategy."""
    from .describe import readable_size

    def row(memory: "Memory") -> tuple[str, ...]:
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        return (memory.strategy, *(readable_size(part) for part in parts))

    return [row(memory) for memory in plan.memory]


def step_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """Rows, steps and tokens of the whole run."""
    rows, about = plan.rows, "" if plan.rows.exact else "at most "
    product = f"{plan.batch} a process x {plan.processes} processes x {plan.accumulation} accumulated"
    tokens = [
        None if count is None else count * (stage.last_step - stage.first_step + 1)
        for count, stage in zip(plan.subject_tokens, plan.stages, strict=True)
    ]
    known = [count for count in tokens if count is not None]
    return [
        ("activations to train on", f"{about}{rows.train:,}"),
        ("held out", f"{about}{rows.held_out:,}"),
        ("activations a step", f"{plan.rows_per_step:,} ({product})"),
        ("steps of an epoch", f"{about}{plan.steps_per_epoch:,}"),
        ("steps", f"{plan.total_steps:,} ({plan.total_steps / plan.steps_per_epoch:.3g} epochs)"),
        ("resumed from", plan.resumes_from or "the start"),
        ("tokens read to make activations", "none, they are there" if rows.text_tokens is None
         else f"{about}{rows.text_tokens:,}"),
        ("tokens read by the subject while training", UNKNOWN if len(known) < len(tokens) else f"{sum(known):,.0f}"),
    ]  # fmt: skip


def stage_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """First and last step of each stage, and what a step of it reads."""

    def row(stage: "PlannedStage", tokens: float | None) -> tuple[str, ...]:
        counts = (stage.first_step, stage.last_step, stage.rows)
        return (stage.objective, *(f"{n:,}" for n in counts), UNKNOWN if tokens is None else f"{tokens:,.0f}")

    return [row(stage, tokens) for stage, tokens in zip(plan.stages, plan.subject_tokens, strict=True)]


def schedule_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """Values of the schedules of each stage where they bend."""
    return [
        (stage.objective, name, "  ".join(f"{step:,}: {value:.3g}" for step, value in corners))
        for stage in plan.stages
        for name, corners in stage.schedules.items()
    ]


def rate_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """Groups of the optimizer."""
    return [
        (g.name, f"{g.parameters:,}", f"{g.learning_rate:g}", f"{g.weight_decay:g}", f"{g.first_step:,}")
        for g in plan.rates
    ]


def file_rows(plan: "DryRun") -> list[tuple[str, ...]]:
    """What will be written; of many checkpoints the first and the last."""
    from .describe import readable_size

    files = plan.files
    checkpoints = [file for file in files if file.path.name.startswith("checkpoint-")]
    left_out = checkpoints[1:-1]
    rows: list[tuple[str, ...]] = []
    for file in files:
        if file in left_out:
            if file is left_out[0]:
                rows.append((f"... {len(left_out)} more checkpoints", "", ""))
            continue
        size = "" if file.size is None else f"about {readable_size(file.size)}"
        rows.append((str(file.path), size, "yes" if file.exists else "no"))
    return rows
