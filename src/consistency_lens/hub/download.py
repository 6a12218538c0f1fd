"""Fetching files of a repository at a commit: each against its checksum, and all of them or nothing under the name.

What comes lies under a hidden name beside the folder it is for, and takes that folder's name when all of it is there
and checked. A download that broke off goes on there, in the middle of a file.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, RepoFile, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm.auto import tqdm

from ..atomic_write import sync_folder
from ..data.activation_cache import file_hash
from ..data.cache_check import VerificationError
from ..hub_connection import asking_hub

# parts of files, under their sha256, beside the files that are whole
PARTS = ".parts"
PATHS_AT_ONCE = 500
MODEL, DATASET = "model", "dataset"  # kinds of repositories


class Snapshot(NamedTuple):
    """A repository at a commit."""

    repo: str
    commit: str
    kind: str
    """`model` or `dataset`."""


class FileRecord(NamedTuple):
    """What an index says of a file."""

    sha256: str
    bytes: int | None = None
    """None where it does not say."""


def download_folder(
    source: Snapshot,
    wanted: Mapping[str, FileRecord],
    path: Path,
    *,
    root: str = "",
    own: Mapping[str, bytes] | None = None,
    check: Callable[[Path], None] | None = None,
    progress: bool = True,
) -> bool:
    """Fetches files of a repository into a folder.

    Args:
        wanted: path in the repository -> its record.
        path: the folder; it must not be there, or be empty, unless it has all these files already.
        root: what the paths begin with that are to lie in the folder itself; others are fetched for `check` alone.
        own: files that are written beside them, path in the folder -> content.
        check: raises an error if the folder, which has another name then, is not to take its place.

    Returns:
        False if all was here already.

    Raises:
        ValueError: if there is something else in its place, or another download is at work on it.
        VerificationError: if a file has another checksum or size; nothing is left then.
        HubError: if the Hub cannot be reached, or fails; the next call goes on.
        OSError: if a file cannot be written.
    """
    _check_no_link(path)
    inside = {name.removeprefix(root): record for name, record in wanted.items() if name.startswith(root)}
    if all(_is_here(path / name, record) for name, record in inside.items()):
        return False
    _check_empty(path)
    # of the commit, so that nothing of another one is in it
    partial = path.with_name(f".{path.name}.{source.commit[:12]}.partial")
    _check_no_link(partial)
    with _locked(partial):
        sized = _sized(source, wanted)
        bar = tqdm(sized.items(), desc=f"downloading {source.repo}", unit=" files", disable=not progress)
        for name, record in bar:
            fetch_checked(source, name, record, partial)
        for name, content in (own or {}).items():
            (partial / root / name).write_bytes(content)
        try:
            if check is not None:
                check(partial / root)
        except Exception:
            shutil.rmtree(partial)
            raise
        _take_name(partial, root, path)
    return True


def _check_no_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"path: {str(path)!r} is a symbolic link; pass the folder itself, or delete the link")


def _is_here(file: Path, record: FileRecord) -> bool:
    return file.is_file() and not file.is_symlink() and file_hash(file) == record.sha256


def _check_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path: {str(path)!r} holds something else; choose another folder or delete that one")


def _sized(source: Snapshot, wanted: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """The records with the sizes that the Hub has of the files.

    Raises:
        ValueError: if it has not all of them.
        VerificationError: if an index says otherwise.
    """
    names, sizes = list(wanted), {}
    with asking_hub(source.repo, source.commit):
        for start in range(0, len(names), PATHS_AT_ONCE):
            paths = HfApi().get_paths_info(
                source.repo, names[start : start + PATHS_AT_ONCE], repo_type=source.kind, revision=source.commit
            )
            sizes.update({path.path: path.size for path in paths if isinstance(path, RepoFile)})
    for name, record in wanted.items():
        if name not in sizes:
            raise ValueError(f"repo: {source.repo!r} lacks a file that it names ({name}); it is incomplete")
        if record.bytes not in (None, sizes[name]):
            raise VerificationError(
                f"file: {name} of {source.repo!r} has {sizes[name]:,} bytes, not {record.bytes:,} as its index says; "
                "it was changed, pass another revision"
            )
    return {name: FileRecord(record.sha256, sizes[name]) for name, record in wanted.items()}


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """A lock on the folder of a download; two at once would write to the same parts.

    Raises:
        ValueError: if another process has it.
    """
    links = [file for file in partial.rglob("*") if file.is_symlink()] if partial.is_dir() else []
    if links:
        raise ValueError(f"path: {str(links[0])!r} is a symbolic link; delete {str(partial)!r} and pull again")
    (partial / PARTS).mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / PARTS / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"path: another download is at work on {str(partial)!r}; wait for it") from error
    try:
        yield
    finally:
        lock.release()


def fetch_checked(
    source: Snapshot, name: str, record: FileRecord, folder: Path, says: str = "INDEX.json says"
) -> Path:
    """Fetches one file of a repository into a folder, or what is missing of it.

    Args:
        name: its path in the repository, and in the folder.
        says: where the checksum is from, for the message.

    Raises:
        VerificationError: if it has another checksum; the folder is removed.
    """
    target = folder / name
    if _is_here(target, record):
        return target
    part = folder / PARTS / record.sha256
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file, asking_hub(source.repo, source.commit):
        if record.bytes is not None and file.tell() > record.bytes:
            file.truncate(0)
        _get(source, name, file, record.bytes)
    found = file_hash(part)
    if found != record.sha256:
        shutil.rmtree(folder)
        raise VerificationError(
            f"file: {name} of {source.repo!r} has sha256 {found[:12]}…, not {record.sha256[:12]}… as {says}; it was "
            "changed or damaged, pull again or pass another revision"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)
    return target


def fetch_bytes(source: Snapshot, name: str, size: int) -> bytes:
    """The content of a small file of this size."""
    content = BytesIO()
    with asking_hub(source.repo, source.commit):
        _get(source, name, content, size)
    return content.getvalue()


def _get(source: Snapshot, name: str, file: BinaryIO, size: int | None) -> None:
    """Appends to a file what it lacks of one in a repository; a connection that is cut is taken up again."""
    url = hf_hub_url(source.repo, name, repo_type=source.kind, revision=source.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size, displayed_filename=name)


def _take_name(partial: Path, root: str, path: Path) -> None:
    """Moves what was fetched to its place, in one step."""
    shutil.rmtree(partial / PARTS, ignore_errors=True)
    source = partial / root
    sync_folder(source)
    os.rename(source, path)  # over an empty folder, if there is one
    shutil.rmtree(partial, ignore_errors=True)
