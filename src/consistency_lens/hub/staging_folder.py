"""Folders in which what is uploaded is laid out beside what it is made from, each of one upload alone.

A lock beside the folder says that it is in use. The system takes the lock away with the process, so what a killed one
has left is known from what another one uploads.
"""

import re
import shutil
from glob import escape
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout


class StagingFolder:
    """A folder that no other upload takes or removes before it is released, at the end of a `with` block or by hand.

    It is the first of `place`, `place-2`, `place-3`, ... that is free. What killed uploads have left in others goes.

    Attributes:
        path: the folder.
    """

    def __init__(self, place: Path, keep: bool = False) -> None:
        """Takes the folder.

        Args:
            place: where; on the file system of what is staged, files in it can be links.
            keep: whether what an earlier upload has left in it stays, to go on from there.

        Raises:
            OSError: if it cannot be made.
        """
        places = (place if number == 1 else place.with_name(f"{place.name}-{number}") for number in count(1))
        self.path, self._lock = next((path, lock) for path in places if (lock := _lock(path)) is not None)
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(exist_ok=True)
        remove_left(place)

    def release(self) -> None:
        """Lets others have the folder, with what is in it."""
        _release(self._lock)

    def remove(self) -> None:
        """Removes the folder, and releases it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def remove_left(place: Path) -> None:
    """Removes what uploads that were killed have left at `place`, `place-2`, ...; what is in use stays."""
    for path in place.parent.glob(f"{escape(place.name)}*"):
        if path.is_dir() and re.fullmatch(r"(-\d+)?", path.name.removeprefix(place.name)):
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                _release(lock)


def _lock(path: Path) -> FileLock | None:
    """The lock of a folder; None while somebody else has it."""
    # not of a thread: one stages, another uploads
    lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _release(lock: FileLock) -> None:
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)  # first: once released, it may be somebody else's
        lock.release()
