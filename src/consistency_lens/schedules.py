"""Durations and schedules, written as one would say them: `"500s"`, `"0.5e"`, `"cosine 1 -> 0.1 over 2e warmup 100s"`.

    schedule = Schedule.parse("linear 0 -> 1 over 50% hold 10%").resolve(steps_per_epoch=100, total_steps=1000)
    schedule(0), schedule(350), schedule(1000)   # 0.0, 0.5, 1.0

Time runs in optimizer steps, counted from 0: first the warm-up (from 0 to the start value, in a straight line), then
the hold (at the start value), then the change, then the end value for good.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self, cast

DURATION_GRAMMAR = "'500s' or 500 (steps), '0.5e' (epochs) or '10%' (of all steps)"
SCHEDULE_GRAMMAR = (
    "a number, 'constant A [warmup DURATION]' or 'linear|cosine|exponential A -> B [over DURATION] [warmup DURATION] "
    f"[hold DURATION]', with DURATION as {DURATION_GRAMMAR}"
)

Kind = Literal["constant", "linear", "cosine", "exponential"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_DURATION = re.compile(r"(?P<steps>\d+)s?|(?P<epochs>\d+\.?\d*|\.\d+)e|(?P<percent>\d+\.?\d*|\.\d+)%")
_CONSTANT = re.compile(rf"(?:constant\s+)?(?P<start>{_NUMBER})(?P<phases>(?:\s+\S+\s+\S+)*)")
_CHANGE = re.compile(
    rf"(?P<kind>linear|cosine|exponential)\s+(?P<start>{_NUMBER})\s*->\s*(?P<end>{_NUMBER})(?P<phases>(?:\s+\S+\s+\S+)*)"
)


def parse_duration(duration: str | int, steps_per_epoch: int | None, total_steps: int) -> int:
    """The number of optimizer steps, to the nearest one, that a duration stands for.

    Args:
        duration: `"500s"` or 500 for steps, `"0.5e"` for epochs, `"10%"` for a share of all steps.
        steps_per_epoch: optimizer steps in one pass over the data; None where the data has no known length.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: if the text is no duration, or counts epochs where their length is unknown.
    """
    match = _match_duration(duration)
    if match["steps"]:
        return int(match["steps"])
    if match["percent"]:
        return round(Fraction(match["percent"]) * total_steps / 100)
    if steps_per_epoch is None:
        raise ValueError(
            f"duration {duration!r} counts epochs, but the data has no known length; write steps, such as '500s'"
        )
    return round(Fraction(match["epochs"]) * steps_per_epoch)


def _match_duration(duration: str | int) -> re.Match[str]:
    match = _DURATION.fullmatch(str(duration).strip())
    if match is None:
        raise ValueError(f"not a duration: {duration!r}; write {DURATION_GRAMMAR}")
    return match


@dataclass(frozen=True)
class ResolvedSchedule:
    """A schedule in optimizer steps: call it with a step to get the value there."""

    kind: Kind
    start: float
    end: float
    warmup: int
    hold: int
    change: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start * step / self.warmup
        elapsed = step - self.warmup - self.hold
        if elapsed >= self.change:
            return self.end
        if elapsed <= 0:
            return self.start
        return self._between(elapsed / self.change)

    def _between(self, fraction: float) -> float:
        if self.kind == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * fraction)) / 2
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** fraction
        return self.start + (self.end - self.start) * fraction


@dataclass(frozen=True)
class Schedule:
    """How a weight, a temperature or a rate changes during training.

    Attributes:
        kind: constant, linear, cosine (half a period) or exponential (a constant factor each step).
        start: the value at the start of the change, and during the hold.
        end: the value at its end and ever after.
        over: duration of the change; None for all that is left of the run.
        warmup: duration of the rise from 0 to `start`, before all else.
        hold: duration of staying at `start` before the change.
    """

    kind: Kind
    start: float
    end: float
    over: str | int | None = None
    warmup: str | int = 0
    hold: str | int = 0

    def __post_init__(self) -> None:
        if self.kind == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(
                f"an exponential schedule needs positive ends, got {self.start:g} -> {self.end:g}; "
                "use a small number such as 1e-4 in place of 0"
            )
        for duration in (self.over, self.warmup, self.hold):
            if duration is not None:
                _match_duration(duration)

    @classmethod
    def parse(cls, text: str | float) -> Self:
        """Reads a schedule: a number, `constant 1`, or for example `cosine 1 -> 0.1 over 2e warmup 100s hold 10%`.

        Raises:
            ValueError: if the text is no schedule; the message shows what is accepted.
        """
        line = str(text).strip()
        match = _CONSTANT.fullmatch(line) or _CHANGE.fullmatch(line)
        if match is None:
            raise ValueError(f"not a schedule: {text!r}; write {SCHEDULE_GRAMMAR}")
        parts = match.groupdict()
        words = parts["phases"].split()
        phases = dict(zip(words[::2], words[1::2], strict=True))
        allowed = {"over", "warmup", "hold"} if "kind" in parts else {"warmup"}
        if not phases.keys() <= allowed or 2 * len(phases) != len(words):
            raise ValueError(
                f"not a schedule: {text!r}, whose {' and '.join(words[::2])} should be each of "
                f"{', '.join(sorted(allowed))} at most once; write {SCHEDULE_GRAMMAR}"
            )
        start = float(parts["start"])
        return cls(cast(Kind, parts.get("kind", "constant")), start, float(parts.get("end", start)), **phases)

    def resolve(self, steps_per_epoch: int | None, total_steps: int) -> ResolvedSchedule:
        """The schedule of a run of a known length, as a function of the optimizer step.

        Raises:
            ValueError: if a duration counts epochs and `steps_per_epoch` is None.
        """
        warmup = parse_duration(self.warmup, steps_per_epoch, total_steps)
        hold = parse_duration(self.hold, steps_per_epoch, total_steps)
        change = max(0, total_steps - warmup - hold)
        if self.over is not None:
            change = parse_duration(self.over, steps_per_epoch, total_steps)
        return ResolvedSchedule(self.kind, self.start, self.end, warmup, hold, change)
