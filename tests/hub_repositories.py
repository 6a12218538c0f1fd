"""What a Hub holds: repositories, their commits and files, and how its API tells of a file."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LARGE_SUFFIXES = (".parquet", ".safetensors", ".arrow", ".bin")


class Blob(NamedTuple):
    """A file's content, and how the Hub holds it."""

    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        """The git hash of the content, or of the pointer that stands for a large file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = pointer.encode() if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: its commits, oldest first, and where its branches and tags stand."""

    kind: str
    name: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: Mapping[str, Blob]) -> Commit:
        oid = hashlib.sha1(f"{self.kind} {self.name} {branch} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, dict(files)))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def head(self) -> Commit:
        """The last commit of main."""
        commit = self.at("main")
        assert commit is not None
        return commit


def is_large(path: str, size: int) -> bool:
    """Whether the Hub holds a file outside git."""
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > 10_000_000)


def entry(path: str, blob: Blob) -> dict[str, Any]:
    size = len(blob.content)
    large = {"lfs": {"oid": blob.sha256, "size": size, "pointerSize": 134}} if blob.is_large else {}
    return {"type": "file", "path": path, "size": size, "oid": blob.git_oid, **large}


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def folders_of(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]
