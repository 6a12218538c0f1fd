"""By how much the memory of a process rises while a lens is fitted; it needs nothing but Python on Linux."""

import ctypes
from pathlib import Path

CLEAR_PEAK = "5"  # proc(5), clear_refs: the peak of the resident set starts again at what it is now


class FitMemory:
    """The resident set of this process from the making of this object on.

    What was freed before goes back to the system first: else the fit would take it over, and seem to need less.

    Attributes:
        before: bytes at the start.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        self.before = _resident("VmRSS")

    @property
    def peak(self) -> int:
        """The most bytes since."""
        return _resident("VmHWM")

    def as_dict(self) -> dict[str, int]:
        """`rise_bytes` (peak - before), `before_bytes` and `peak_bytes`."""
        peak = self.peak
        return {"rise_bytes": peak - self.before, "before_bytes": self.before, "peak_bytes": peak}


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(value) * 1024
