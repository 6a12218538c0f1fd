"""Which parameter groups stand still at first, from which step they train, and how their rates rise then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..schedules import check_duration, parse_duration
from .group_settings import check_group, of_group

SETTING = "unfreeze"
GRAMMAR = "'<group> <when> [warmup <duration>]', such as 'decoder_base 2e warmup 100s' or 'lora 500s'"


@dataclass(frozen=True)
class Unfreeze:
    """A group that trains from `start` on, its rate rising from 0 for `warmup`; both are durations."""

    group: str
    start: str
    warmup: str = "0s"

    @classmethod
    def parse(cls, text: str) -> "Unfreeze":
        """Reads `"decoder_base 2e warmup 100s"`.

        Raises:
            ValueError: for an unknown group, or what is no duration.
        """
        words = str(text).split()
        if len(words) not in (2, 4) or words[2:3] not in ([], ["warmup"]):
            raise ValueError(f"{SETTING}: each is {GRAMMAR}; got {text!r}")
        check_group(SETTING, words[0])
        for duration in words[1::2]:
            check_duration(SETTING, duration)
        return cls(words[0], words[1], *words[3:])


def parse_unfreeze(texts: Sequence[str]) -> dict[str, Unfreeze]:
    """Group or kind -> when it begins to train.

    Raises:
        ValueError: for a text that is not understood, or a group that is named twice.
    """
    parsed: dict[str, Unfreeze] = {}
    for text in texts:
        unfreeze = Unfreeze.parse(text)
        if unfreeze.group in parsed:
            raise ValueError(f"{SETTING}: {unfreeze.group} is named twice, in {list(texts)}; leave one out")
        parsed[unfreeze.group] = unfreeze
    return parsed


@dataclass(frozen=True)
class Unfreezing:
    """When groups begin to train, in optimizer steps of the whole run, counted from 0.

    Attributes:
        starts: group or kind -> (first step that moves it, steps of its warm-up).
    """

    starts: Mapping[str, tuple[int, int]]

    @classmethod
    def resolve(cls, texts: Sequence[str], steps_per_epoch: int | None, total_steps: int) -> "Unfreezing":
        """The plan of a run of a known length.

        Raises:
            ValueError: if a group would never train, or epochs are counted where their length is unknown.
        """
        starts = {}
        for group, unfreeze in parse_unfreeze(texts).items():
            start = parse_duration(unfreeze.start, steps_per_epoch, total_steps)
            warmup = parse_duration(unfreeze.warmup, steps_per_epoch, total_steps)
            if start >= total_steps:
                raise ValueError(
                    f"{SETTING}: {group} would train from step {start} on, but the run has {total_steps}; begin sooner"
                )
            starts[group] = start, warmup
        return cls(starts)

    def is_frozen(self, group: str, step: int) -> bool:
        """Whether the step that follows `step` others leaves a group as it is."""
        return step < (of_group(self.starts, group) or (0, 0))[0]

    def factor(self, group: str, step: int) -> float:
        """The factor on a group's learning rate for the step that follows `step` others."""
        start, warmup = of_group(self.starts, group) or (0, 0)
        if step < start:
            return 0.0
        # the first step of a warm-up already moves, as that of a schedule does
        return min(1.0, (step - start + 1) / warmup) if warmup else 1.0
