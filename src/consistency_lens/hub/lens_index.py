"""INDEX.json of a repository of lenses: what each one reads, how well, and the size and sha256 of each of its files.

A lone lens lies at the root of a repository, several in a folder each, which has the lens's name:

    {"schema": "consistency-lens/1", "lenses": {"<name>": {"path": "" or "<name>", "kind": ..., "files": {...}, ...}}}
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .download import FileRecord
from .index import INDEX_FILE, PART, is_sha256, name_problem, read_mapping
from .lens_folder import CONFIGS
from .releases import is_release_tag

SCHEMA = "consistency-lens/1"
NEEDED = ("config.json", "model.safetensors")
# of metrics.json, what an index has as far as it was measured
FIGURES = ("fve", "fve_nrm", "cosine", "kl", "kl_recovered", "top1_agreement", "perplexity_ratio", "rows", "documents")


@dataclass(frozen=True)
class BaseModel:
    """The model that a lens reads."""

    name: str
    """Hub id, or a relative path for one that was in a folder."""
    revision: str | None
    """The commit on the Hub; None for a folder."""
    weights_hash: str | None
    """Sha256 over its weights as they were loaded; None where nobody recorded it."""


@dataclass(frozen=True)
class LensEntry:
    """One lens, decoder or encoder of a repository."""

    path: str
    """Its folder; empty for the root."""
    kind: str
    """Its `model_type`."""
    release: str
    """The tag that it came with, `vYYYY.MM.DD`."""
    base_model: BaseModel
    layer: int
    num_text_tokens: int
    metrics: Mapping[str, float]
    """Those of `FIGURES` that were measured."""
    package_version: str
    """Of this library, when it was published."""
    license: str | None
    """Of the base model, as the Hub names it; None if none is stated."""
    files: Mapping[str, FileRecord]
    """Name in its folder -> record."""

    @property
    def paths(self) -> dict[str, FileRecord]:
        """Path in the repository -> record."""
        return {self.root + name: record for name, record in self.files.items()}

    @property
    def root(self) -> str:
        """What the paths begin with."""
        return f"{self.path}/" if self.path else ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.bytes or 0 for record in self.files.values())


def index_text(entries: Mapping[str, LensEntry]) -> str:
    """The content of INDEX.json, lenses in alphabetical order."""
    lenses = {}
    for name in sorted(entries):
        files = {file: record._asdict() for file, record in sorted(entries[name].files.items())}
        lenses[name] = {**asdict(entries[name]), "files": files}
    return json.dumps({"schema": SCHEMA, "lenses": lenses}, indent=2, allow_nan=False) + "\n"


def read_lens_index(content: str | bytes, repo: str) -> dict[str, LensEntry]:
    """Name -> entry, each of them checked: nothing in it leads out of the lens's own folder.

    Args:
        content: of INDEX.json.
        repo: for the messages.

    Raises:
        ValueError: if it is no JSON, has another schema, or an entry is not as it must be.
    """
    found = read_mapping(content, repo)
    if found.get("schema") != SCHEMA or not isinstance(found.get("lenses"), dict):
        raise ValueError(
            f"repo: {INDEX_FILE} of {repo!r} has the schema {found.get('schema')!r}, and {SCHEMA!r} is read; pass a "
            "repository of lenses, or update consistency-lens"
        )
    lenses = found["lenses"]
    for name, entry in lenses.items():
        problem = _problem(name, entry, alone=len(lenses) == 1)
        if problem is not None:
            raise ValueError(f"repo: {INDEX_FILE} of {repo!r}, {name!r}: {problem}; pass another revision")
    return {name: _entry(of) for name, of in lenses.items()}


def _entry(of: Mapping[str, Any]) -> LensEntry:
    files = {name: FileRecord(**record) for name, record in of["files"].items()}
    return LensEntry(**{**of, "base_model": BaseModel(**of["base_model"]), "files": files})


def _problem(name: str, entry: Any, alone: bool) -> str | None:
    """What is wrong with an entry, if anything is."""
    if not _has_fields(entry, LensEntry):
        return f"it must have the fields {', '.join(field.name for field in fields(LensEntry))}"
    if not re.fullmatch(PART, name) or not (entry["path"] == name or (alone and entry["path"] == "")):
        return f"the path is {entry['path']!r}, not that of its folder"
    if entry["kind"] not in CONFIGS:
        return f"the kind is {entry['kind']!r}, not one of {', '.join(CONFIGS)}"
    if not is_release_tag(entry["release"]):
        return f"the release is {entry['release']!r}, not vYYYY.MM.DD"
    base = entry["base_model"]
    if not _has_fields(base, BaseModel) or not isinstance(base["name"], str):
        return "base_model must have name, revision and weights_hash"
    if not all(value is None or isinstance(value, str) for value in (*base.values(), entry["license"])):
        return "a text of base_model or license is none"
    numbers, metrics = (entry["layer"], entry["num_text_tokens"]), entry["metrics"]
    if not all(type(number) is int and number >= 0 for number in numbers):
        return "layer and num_text_tokens must be whole numbers"
    if not isinstance(metrics, dict) or not all(map(_is_figure, metrics.values())):
        return "metrics must be numbers"
    if not isinstance(entry["package_version"], str):
        return "package_version must be a text"
    return _files_problem(entry["files"])


def _files_problem(files: Any) -> str | None:
    if not isinstance(files, dict):
        return "files must be a mapping"
    missing = [file for file in NEEDED if file not in files]
    if missing:
        return f"it has no {missing[0]}"
    for name, record in files.items():
        if not isinstance(record, dict) or sorted(record) != ["bytes", "sha256"] or not is_sha256(record["sha256"]):
            return f"the record of {name!r} has no sha256 and bytes"
        if type(record["bytes"]) is not int or record["bytes"] < 0:
            return f"the size of {name!r} is no whole number"
    return name_problem(list(files), "a lens")


def _has_fields(found: Any, of: type[Any]) -> bool:
    return isinstance(found, dict) and sorted(found) == sorted(field.name for field in fields(of))


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
