"""What can go wrong between a client and the Hub on loopback, at requests that are counted."""

import re
import threading
from enum import Enum
from typing import NamedTuple


class Fault(Enum):
    """What can happen to the answer of a request."""

    ERROR = "500, and nothing is done"
    BUSY = "429 with Retry-After, and nothing is done"
    REFUSED = "the connection is closed before anything is done"
    LOST = "what is asked for is done, but the connection is closed before the answer"
    CUT = "the connection is closed half way through the body"
    CORRUPT = "a byte of a file's content is another"
    SLOW = "the answer comes late"


class Planned(NamedTuple):
    """A fault that is to come."""

    fault: Fault
    method: str
    pattern: str
    """Of the paths of the requests that it counts."""
    first: int
    """How many of these pass before."""
    times: int
    """How many of these it happens to."""


class PlannedFaults:
    """The faults of a server.

    Attributes:
        planned: each with how many requests it has counted.
        happened: those that came, with what was asked.
        retry_after, slowness: seconds, of `BUSY` and of `SLOW`.
    """

    def __init__(self) -> None:
        self.planned: dict[Planned, int] = {}
        self.happened: list[tuple[Fault, str, str]] = []
        self.retry_after, self.slowness = 1, 0.3
        self.counting = threading.Lock()

    def plan(self, fault: Fault, method: str = "", pattern: str = "", first: int = 0, times: int = 1) -> None:
        """Makes requests fail that are to come: of those with the method and the pattern, `times` after the first."""
        self.planned[Planned(fault, method, pattern, first, times)] = 0

    def fault_of(self, method: str, path: str) -> Fault | None:
        """What is to happen to a request now."""
        found = None
        with self.counting:
            for plan, seen in self.planned.items():
                if plan.method in ("", method) and re.search(plan.pattern, path):
                    self.planned[plan] = seen + 1
                    if plan.first <= seen < plan.first + plan.times:
                        found = plan.fault
            if found is not None:
                self.happened.append((found, method, path))
        return found
