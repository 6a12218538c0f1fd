"""Folders in which what is uploaded is laid out beside what it is made from, each of one upload alone.

A lock on a file beside the folder says that it is in use. The system takes it away with the process, so what a killed
one has left is known from what another one uploads. The empty file stays: if it went, two uploads could each lock one
of its name. Where a system has no such locks, `filelock` makes do with whether the file is there, and what killed
uploads have left may stay.
"""

import os
import re
import shutil
from contextlib import suppress
from glob import escape
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout


class StagingFolder:
    """An empty folder that no other upload takes or removes until it is removed, or its `with` block ends.

    It is the first of `place`, `place-2`, `place-3`, ... that can be had. What killed uploads have left in others
    goes. At the end of the block it stays, to be looked at before the next upload; not after an exception.

    Args:
        place: where; on the file system of what is staged, files in it can be links.

    Attributes:
        path: the folder.

    Raises:
        OSError: if it cannot be made or locked.
    """

    def __init__(self, place: Path) -> None:
        places = (place if number == 1 else place.with_name(f"{place.name}-{number}") for number in count(1))
        self.path, self._lock = next((path, lock) for path in places if (lock := _clear(path)) is not None)
        self.path.mkdir()
        remove_left(place)

    def remove(self) -> None:
        """Removes the folder, unless it may be another upload's by now, and lets others have it."""
        if self._lock.is_locked:
            try:
                shutil.rmtree(self.path, ignore_errors=True)
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.remove()
        self._lock.release()


def remove_left(place: Path) -> None:
    """Removes what it can of what killed uploads have left at `place`, `place-2`, ...; what is in use stays."""
    with suppress(OSError):
        for path in place.parent.glob(f"{escape(place.name)}*"):
            if path.is_dir() and re.fullmatch(r"(-\d+)?", path.name.removeprefix(place.name)):
                lock = _clear(path)
                if lock is not None:
                    lock.release()


def _clear(path: Path) -> FileLock | None:
    """Locks a place and removes what is there; None if another upload has it, or another user's files or lock stay."""
    file = path.with_name(f"{path.name}.lock")
    lock = FileLock(file, thread_local=False)  # one thread stages, another uploads
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except PermissionError:
        if not file.exists():
            raise
        return None
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        lock.release()
        return None
    return lock
