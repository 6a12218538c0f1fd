"""INDEX.json: what a repository of lenses holds, with the sha256 of each file; what is the same for all kinds of them.

A repository comes from anybody. So its index is read up to a limit, against the hash that the Hub has of it, and no
name in it leads out of a folder or to a file that could run code when it is read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from huggingface_hub import HfApi, RepoFile

from ..data.cache_check import VerificationError
from ..hub_connection import asking_hub
from .download import Snapshot, fetch_bytes
from .releases import is_release_tag, repository_info, tags_of

INDEX_FILE = "INDEX.json"
LARGEST_INDEX = 16 * 2**20  # bytes
# No part begins with a dot, and none has a slash, a backslash or a colon: no path leads out of its folder anywhere.
PART = r"[A-Za-z0-9_][\w.-]*"
PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")


class Indexed(Protocol):
    """An entry of an index."""

    @property
    def release(self) -> str:
        """The tag that it came with."""
        ...


Entry = TypeVar("Entry", bound=Indexed)


@dataclass(frozen=True)
class IndexedRepository(Generic[Entry]):
    """What a repository holds at a commit."""

    source: Snapshot
    entries: Mapping[str, Entry]
    """Name -> lens."""
    tags: tuple[str, ...]
    """All its releases, in order."""
    files: frozenset[str]
    """All paths of the repository."""
    unfinished: str | None = None
    """A release on main that has no tag, for whoever made it was stopped before; not what `entries` are of, unless it
    was asked for."""
    later: str | None = None
    """The commit of main, where that is no release and `entries` are of the newest one."""

    @property
    def repo(self) -> str:
        return self.source.repo

    @property
    def commit(self) -> str:
        return self.source.commit


class _State(NamedTuple):
    """A repository at a revision, before its index is read."""

    source: Snapshot
    files: frozenset[str]


def open_index(
    repo: str,
    kind: str,
    revision: str | None,
    read: Callable[[bytes, str], Mapping[str, Entry]],
    content: str,
    also_unfinished: bool = False,
) -> IndexedRepository[Entry]:
    """What a repository holds.

    A release whose tag is missing is not shown, nor what main has come to since the last release: its files may be
    others than the index says, for a training writes none. Unless a revision is asked for, the newest release that has
    its tag is taken then.

    Args:
        repo: its id.
        kind: `model` or `dataset`.
        revision: tag of a release, commit or branch; default: main if it is a release, else the newest.
        read: entries from the index; raises a ValueError for an index that it does not take.
        content: what is looked for, such as "tuned lenses".
        also_unfinished: whether main is taken as it is.

    Raises:
        ValueError: if there is no such repository or revision, it has no index or none that is read, or no release of
            it was finished.
        VerificationError: if the index is not what the Hub has a hash of.
        HubError: if the Hub cannot be reached, or fails.
    """
    found = _state(repo, kind, revision, content)
    releases = {tag: commit for tag, commit in sorted(tags_of(repo, kind).items()) if is_release_tag(tag)}
    tags = tuple(releases)
    entries = read(_index_content(found.source), repo)
    missing = next((entry.release for entry in entries.values() if entry.release not in tags), None)
    is_release = missing is None and found.source.commit in releases.values()
    if is_release or revision is not None or also_unfinished:
        return IndexedRepository(found.source, entries, tags, found.files, missing)
    if missing is not None and not tags:
        raise ValueError(f"repo: the release {missing} of {repo!r} is not finished, it has no tag; push it once more")
    if not tags:
        raise ValueError(f"repo: {repo!r} has no release, and its {INDEX_FILE} names no {content}; push one")
    newest = _state(repo, kind, tags[-1], content)
    entries = read(_index_content(newest.source), repo)
    later = found.source.commit if found.source.commit != newest.source.commit else None
    return IndexedRepository(newest.source, entries, tags, newest.files, missing, later)


def _state(repo: str, kind: str, revision: str | None, content: str) -> _State:
    with asking_hub(repo, revision):
        info = repository_info(repo, kind, revision)
    files = frozenset(sibling.rfilename for sibling in info.siblings or [])
    if info.sha is None or INDEX_FILE not in files:
        raise ValueError(f"repo: {repo!r} holds no {content} (no {INDEX_FILE}); pass one that does")
    return _State(Snapshot(repo, info.sha, kind), files)


def _index_content(source: Snapshot) -> bytes:
    """The index: not more than may be, and not other than the Hub says."""
    with asking_hub(source.repo, source.commit):
        paths = HfApi().get_paths_info(source.repo, [INDEX_FILE], repo_type=source.kind, revision=source.commit)
    file = next((path for path in paths if isinstance(path, RepoFile)), None)
    if file is None:
        raise ValueError(f"repo: {INDEX_FILE} of {source.repo!r} is no file; pass another revision")
    if file.size > LARGEST_INDEX:
        raise ValueError(
            f"repo: {INDEX_FILE} of {source.repo!r} has {file.size:,} bytes, and at most {LARGEST_INDEX:,} are read; "
            "pass another revision"
        )
    content = fetch_bytes(source, INDEX_FILE, file.size)
    if file.lfs is not None:
        found, wanted = hashlib.sha256(content).hexdigest(), file.lfs.sha256
    else:
        found, wanted = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), file.blob_id
    if found != wanted:
        raise VerificationError(
            f"index: {INDEX_FILE} of {source.repo!r} has the hash {found[:12]}…, not {wanted[:12]}… as the Hub says; "
            "it was damaged on its way, try again"
        )
    return content


def read_mapping(content: str | bytes, repo: str) -> dict[str, Any]:
    """The JSON object of an index.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"repo: {INDEX_FILE} of {repo!r} is no JSON ({error}); pass another revision") from error
    if not isinstance(found, dict):
        raise ValueError(f"repo: {INDEX_FILE} of {repo!r} holds no mapping; pass another revision")
    return found


def is_printable(text: Any) -> bool:
    """Whether this is a text that does nothing to a terminal."""
    return isinstance(text, str) and text.isprintable()


def is_pickled(file: str) -> bool:
    """Whether a file's name is one of a format that may run code when it is read."""
    return PurePosixPath(file).suffix.lower() in PICKLED_SUFFIXES


def name_problem(names: Sequence[str], of: str) -> str | None:
    """What is wrong with names of files in a folder, if anything is."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(PART, name) or name == INDEX_FILE or is_pickled(name):
            return f"{name!r} is no file of {of}"
    if len({name.casefold() for name in names}) < len(names):
        return "two of its files have one name where capitals do not count"
    return None
