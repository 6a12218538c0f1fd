"""The folder of a run: nothing of others lies in it that would be lost, and one training has it to itself."""

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".training.lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that has none, as some clusters mount them

logger = logging.getLogger(__name__)


@contextmanager
def sole_training(folder: Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other trainings out; the system ends the lock of one that is killed.

    To be called by the first process of a run. What was made and stays empty, after a mistake, is removed.

    Raises:
        ValueError: if nothing can be written there, or another training is at work in it.
    """
    file, new = folder / LOCK_FILE, [path for path in (folder, *folder.parents) if not path.exists()]
    lock: AbstractContextManager
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file).acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"output_dir: another training is at work in {str(folder)!r}; wait for it, stop it, or pass another folder"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise ValueError(
                f"output_dir: cannot write to {str(folder)!r} ({error.strerror or error}); pass another folder"
            ) from error
        logger.warning("%s: its file system has no locks; see to it that no other training writes there", folder)
        lock = nullcontext()
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            with suppress(OSError):  # it holds a run
                for path in new:
                    path.rmdir()


def check_folder(folder: Path, model_type: str) -> None:
    """Checks that what a training writes at its end takes the place of nothing but its like.

    Args:
        folder: of the run; it need not be there.
        model_type: of what is trained.

    Raises:
        ValueError: if another model lies there, or the README of something else.
    """
    config, found = folder / "config.json", None
    if config.is_file():
        try:
            found = json.loads(config.read_text(encoding="utf-8"))["model_type"]
        except (ValueError, KeyError, TypeError):
            found = "unknown"
    if found == model_type:
        return
    for name, what in ((config.name, f"a model of type {found!r}"), ("README.md", "a README of something else")):
        if (folder / name).exists():
            raise ValueError(
                f"output_dir: {str(folder)!r} holds {what}, which the training would write over; pass another folder"
            )
