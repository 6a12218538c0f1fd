"""When each stage of a run begins, and what its schedules say at a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..schedules import Schedule
from .arguments import ConsistencyLensTrainingArguments


def steps_in_epoch(rows: int, args: ConsistencyLensTrainingArguments, processes: int) -> int:
    """Optimizer steps in one pass over that many training rows; the last may have fewer micro-batches."""
    together = args.train_batch_size * processes
    batches = rows // together if args.dataloader_drop_last else -(-rows // together)
    return max(1, -(-batches // args.gradient_accumulation_steps))


@dataclass(frozen=True)
class Timetable:
    """The stages of a run in optimizer steps.

    Attributes:
        args: which stages there are, and their schedules.
        steps_per_epoch: optimizer steps in one pass over the rows; None for data of unknown length.
        total_steps: of the whole run.
        ends: stage index -> the step at which it ended early; the stages after it begin sooner.
    """

    args: ConsistencyLensTrainingArguments
    steps_per_epoch: int | None
    total_steps: int
    ends: Mapping[int, int] = field(default_factory=dict)

    def bounds(self) -> list[tuple[int, int]]:
        """(first step, step after the last) of each stage."""
        starts = self.args.stage_starts(self.steps_per_epoch or self.total_steps, self.total_steps)
        for index, end in sorted(self.ends.items()):
            if index + 1 < len(starts):
                sooner = starts[index + 1] - end
                starts[index + 1 :] = [start - sooner for start in starts[index + 1 :]]
        return list(zip(starts, [*starts[1:], self.total_steps], strict=True))

    def stage_at(self, step: int) -> tuple[int, int, int]:
        """(index, first step, length) of the stage that a global step lies in."""
        bounds = self.bounds()
        index = max(i for i, (start, _) in enumerate(bounds) if start <= step or i == 0)
        return index, bounds[index][0], bounds[index][1] - bounds[index][0]

    def scheduled(self, name: str, step: int) -> float:
        """A weight, or the temperature, at a global step; schedules run from the start of their stage to its end."""
        index, start, length = self.stage_at(step)
        schedule = Schedule.parse(self.args.schedule_of(name, index))
        return schedule.resolve(self.steps_per_epoch, length)(step - start)

    def rate_factor(self, step: int) -> float:
        """The factor on every learning rate for the optimizer step that follows `step` others."""
        index, start, length = self.stage_at(step)
        schedule = Schedule.parse(self.args.schedule_of("learning_rate_schedule", index))
        # a schedule's warm-up is 0 at its first step, which would waste that step
        return schedule.resolve(self.steps_per_epoch, length)(step - start + 1)
