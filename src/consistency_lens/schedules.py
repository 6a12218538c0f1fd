"""Durations and schedules, written as one would say them: `"500s"`, `"0.5e"`, `"cosine 1 -> 0.1 over 2e warmup 100s"`.

    schedule = Schedule.parse("linear 0 -> 1 over 50% hold 10%").resolve(steps_per_epoch=100, total_steps=1000)
    schedule(0), schedule(350), schedule(1000)   # 0.0, 0.5, 1.0

Time runs in optimizer steps, counted from 0: first the warm-up (from 0, or from another value, to the start value, in
a straight line), then the hold (at the start value), then the change, then the end value for good.

    "polynomial 1 -> 0 power 2"                      what is left of the change, squared
    "restarts 1 -> 0.1 every 500s times 2"           cosines from 1 to 0.1: the first of 500 steps, each twice as long
    "cosine 1 -> 0.1 warmup 1000s from 0.1"          the warm-up starts at 0.1
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Self, cast

DURATION_GRAMMAR = "'500s' or 500 (steps), '0.5e' (epochs) or '10%' (of all steps)"
SCHEDULE_GRAMMAR = (
    "a number, 'constant A [warmup DURATION [from C]]', 'linear|cosine|exponential A -> B [over DURATION] "
    "[warmup DURATION [from C]] [hold DURATION]', or likewise 'polynomial A -> B power P' and "
    f"'restarts A -> B every DURATION [times N]', with DURATION as {DURATION_GRAMMAR}"
)

Kind = Literal["constant", "linear", "cosine", "restarts", "polynomial", "exponential"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_DURATION = re.compile(r"(?P<steps>\d+)s?|(?P<epochs>\d+\.?\d*|\.\d+)e|(?P<percent>\d+\.?\d*|\.\d+)%")
_PHASES = r"(?P<phases>(?:\s+\S+\s+\S+)*)"
_CONSTANT = re.compile(rf"(?:constant\s+)?(?P<start>{_NUMBER}){_PHASES}")
_CHANGE = re.compile(
    r"(?P<kind>linear|cosine|restarts|polynomial|exponential)\s+"
    rf"(?P<start>{_NUMBER})\s*->\s*(?P<end>{_NUMBER}){_PHASES}"
)
_PHASES_OF_ALL = {"over", "warmup", "from", "hold"}
# kind -> the words that may follow it, and below the one that must
_WORDS = {
    "constant": {"warmup", "from"},
    "linear": _PHASES_OF_ALL,
    "cosine": _PHASES_OF_ALL,
    "exponential": _PHASES_OF_ALL,
    "polynomial": _PHASES_OF_ALL | {"power"},
    "restarts": _PHASES_OF_ALL | {"every", "times"},
}
_NEEDED = {"polynomial": "power", "restarts": "every"}


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


def check_duration(setting: str, duration: str | int) -> None:
    """ValueError, which names the setting, for what is no duration: a mistake shows before there is any data."""
    try:
        _match_duration(duration)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


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
    warmup_from: float = 0.0
    power: float = 1.0
    cycle: int = 1
    times: float = 1.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.warmup_from + (self.start - self.warmup_from) * step / self.warmup
        elapsed = step - self.warmup - self.hold
        if elapsed >= self.change:
            return self.end
        if elapsed <= 0:
            return self.start
        return self._between(self._fraction_of_cycle(elapsed) if self.kind == "restarts" else elapsed / self.change)

    def _fraction_of_cycle(self, elapsed: int) -> float:
        """How much of the cycle that a step lies in has passed, 0 at its start."""
        if self.times == 1:
            return elapsed % self.cycle / self.cycle
        passed, length = float(elapsed), float(self.cycle)
        while passed >= length:
            passed, length = passed - length, length * self.times
        return passed / length

    def _between(self, fraction: float) -> float:
        if self.kind in ("cosine", "restarts"):
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * fraction)) / 2
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** fraction
        if self.kind == "polynomial":
            return self.end + (self.start - self.end) * (1 - fraction) ** self.power
        return self.start + (self.end - self.start) * fraction


@dataclass(frozen=True)
class Schedule:
    """How a weight, a temperature or a rate changes during training.

    Attributes:
        kind: constant, linear, cosine (half a period), restarts (such cosines one after the other, SGDR of Loshchilov
            and Hutter 2016, arXiv:1608.03983), polynomial (a power of what is left) or exponential (a constant factor
            each step).
        start: the value at the start of the change, and during the hold.
        end: the value at its end and ever after. Restarts come near it at the end of each cycle; the last one is cut
            where the change ends.
        over: duration of the change; None for all that is left of the run.
        warmup: duration of the rise to `start`, before all else.
        warmup_from: the value that the rise begins at.
        hold: duration of staying at `start` before the change.
        power: of a polynomial, positive.
        every: duration of the first cycle of restarts.
        times: how many times as long as the one before each further cycle is, 1 or more.
    """

    kind: Kind
    start: float
    end: float
    over: str | int | None = None
    warmup: str | int = 0
    hold: str | int = 0
    warmup_from: float = 0.0
    power: float = 1.0
    every: str | int = 1
    times: float = 1.0

    def __post_init__(self) -> None:
        if self.kind == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(
                f"an exponential schedule needs positive ends, got {self.start:g} -> {self.end:g}; "
                "use a small number such as 1e-4 in place of 0"
            )
        if not self.power > 0:
            raise ValueError(f"a polynomial schedule needs a positive power, got {self.power:g}; 2 is usual")
        if not self.times >= 1:
            raise ValueError(f"restarts: each cycle is 'times' as long as the last, 1 or more, got {self.times:g}")
        for duration in (self.over, self.warmup, self.hold, self.every):
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
        kind, words = parts.get("kind", "constant"), parts["phases"].split()
        phases: dict[str, Any] = dict(zip(words[::2], words[1::2], strict=True))
        if not phases.keys() <= _WORDS[kind] or 2 * len(phases) != len(words):
            raise ValueError(
                f"not a schedule: {text!r}, whose {' and '.join(words[::2])} should be each of "
                f"{', '.join(sorted(_WORDS[kind]))} at most once; write {SCHEDULE_GRAMMAR}"
            )
        if kind in _NEEDED and _NEEDED[kind] not in phases:
            raise ValueError(f"not a schedule: {text!r}, which lacks '{_NEEDED[kind]}'; write {SCHEDULE_GRAMMAR}")
        if "from" in phases:
            if "warmup" not in phases:
                raise ValueError(f"not a schedule: {text!r}, whose 'from' has no warmup; write {SCHEDULE_GRAMMAR}")
            phases["warmup_from"] = phases.pop("from")
        for name in ("warmup_from", "power", "times"):
            if name in phases:
                phases[name] = _number(phases[name], text)
        start = float(parts["start"])
        return cls(cast(Kind, kind), start, float(parts.get("end", start)), **phases)

    def lowest(self) -> float:
        """The smallest value that it takes."""
        warmup = () if str(self.warmup) in ("0", "0s") else (self.warmup_from,)
        return min(self.start, self.end, *warmup)

    def is_zero(self) -> bool:
        """Whether it never leaves 0."""
        return self.start == self.end == self.warmup_from == 0

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
        cycle = max(1, parse_duration(self.every, steps_per_epoch, total_steps))
        return ResolvedSchedule(
            self.kind, self.start, self.end, warmup, hold, change, self.warmup_from, self.power, cycle, self.times
        )


def _number(word: str, text: str | float) -> float:
    if re.fullmatch(_NUMBER, word) is None:
        raise ValueError(f"not a schedule: {text!r}, where {word!r} is no number; write {SCHEDULE_GRAMMAR}")
    return float(word)
