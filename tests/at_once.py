"""Works of several threads at once."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any


def at_once(*works: Callable[[], Any], times: int) -> list[list[Any]]:
    """What each work gives, each done so many times in a thread of its own; threads interrupt each other all the time.

    The first error of any of them is raised.
    """
    start, interval = Barrier(len(works)), sys.getswitchinterval()

    def repeat(work: Callable[[], Any]) -> list[Any]:
        start.wait()
        return [work() for _ in range(times)]

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(works)) as threads:
            return list(threads.map(repeat, works))
    finally:
        sys.setswitchinterval(interval)
