"""Files that appear under their name whole or not at all."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its name `path` when it is whole, and stays there when the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # where the disk is full, it would take room
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """The same as an open file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def check_writable(folder: Path, argument: str) -> None:
    """Checks, before the work that is to be kept there, that a folder can be made and written to.

    Raises:
        ValueError: if it cannot, naming the argument.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument}: cannot write to {str(folder)!r} ({error.strerror or error}); pass another"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes safetensors whole or not at all, from where the tensors lie.

    Raises:
        OSError: if they cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as of any new file; some versions of safetensors write one for its owner
        try:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"}
            )
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # the system's own, which says it in its words
            if number is None:
                raise OSError(f"{path}: {error}") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes JSON whole or not at all.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON cannot hold; the old file stays.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes sure that a folder's files survive a power failure."""
    for file in [folder, *folder.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
