"""INDEX.json: what a repository of tuned lenses holds, with the sha256 of each file (plan, section 13.1).

Beside the plan's fields an entry has the verdicts of the acceptance gates, the licence of the model, and the licence
texts that belong to it, so that a download can check all that it takes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from .lens_places import CONFIG_FILE

INDEX_FILE = "INDEX.json"
TREE, LICENSES = "tuned_lenses", "LICENSES"
NEEDED = (CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE)
LOCAL = "local"  # stands in the place of the organisation for models that are on no Hub
GATES = ("gate_A", "gate_B", "gate_C", "gate_D")
TAG_FORMAT = "v%Y.%m.%d"
# An organisation may be missing (gpt2); no part begins with a dot, so no path leads out of the repository.
PART = r"[A-Za-z0-9_][\w.-]*"
MODEL_PATTERN = rf"{PART}(/{PART})?"
PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")


class TunedLensVerificationError(Exception):
    """A tuned lens, or what came of it over a network, is not what its provenance or the index says."""


@dataclass(frozen=True)
class IndexEntry:
    """One tuned lens of a repository."""

    path: str
    """Its folder."""
    sha256: Mapping[str, str]
    """Of every file in that folder, by name."""
    tl_version: str
    """The release that it came with, `vYYYY.MM.DD`."""
    model_commit: str | None
    """Of the model on the Hub; None for a local one."""
    tokenizer_commit: str | None
    acceptance: Mapping[str, bool]
    """Gate -> whether it passed."""
    license: str | None
    """Of the model, as the Hub names it; None if none is stated."""
    licenses: Mapping[str, str]
    """Path in the repository -> sha256 of the licence texts of the model."""

    @property
    def files(self) -> dict[str, str]:
        """Path in the repository -> sha256, of all that belongs to the lens."""
        return {f"{self.path}/{name}": digest for name, digest in self.sha256.items()} | dict(self.licenses)


def index_text(entries: Mapping[str, IndexEntry]) -> str:
    """The content of INDEX.json, models in alphabetical order."""
    return json.dumps({name: asdict(entries[name]) for name in sorted(entries)}, indent=2) + "\n"


def read_index(text: str | bytes, repo: str) -> dict[str, IndexEntry]:
    """Model -> its entry, each of them checked: nothing in it leads out of the lens's own folders.

    Args:
        text: the content of INDEX.json.
        repo: for the messages.

    Raises:
        ValueError: if it is no JSON, or an entry is not as it must be.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"repo: {INDEX_FILE} of {repo!r} is no JSON ({error}); pass another revision") from error
    if not isinstance(found, dict):
        raise ValueError(f"repo: {INDEX_FILE} of {repo!r} holds no mapping of models; pass another revision")
    entries = {}
    for name, entry in found.items():
        problem = _problem(name, entry)
        if problem is not None:
            raise ValueError(f"repo: {INDEX_FILE} of {repo!r}, {name!r}: {problem}; pass another revision")
        entries[name] = IndexEntry(**entry)
    return entries


def _problem(name: str, entry: Any) -> str | None:
    """What is wrong with an entry of INDEX.json, if anything is."""
    names = [field.name for field in fields(IndexEntry)]
    if not isinstance(entry, dict) or sorted(entry) != sorted(names):
        return f"it must have the fields {', '.join(names)}"
    if not re.fullmatch(MODEL_PATTERN, name) or entry["path"] != f"{TREE}/{name}":
        return f"the path is {entry['path']!r}, not {TREE}/<model>"
    if not isinstance(entry["sha256"], dict) or not isinstance(entry["licenses"], dict):
        return "sha256 and licenses must be mappings of files"
    missing = [file for file in NEEDED if file not in entry["sha256"]]
    if missing:
        return f"it has no {missing[0]}"
    for file in entry["sha256"]:
        if not re.fullmatch(PART, file) or PurePosixPath(file).suffix.lower() in PICKLED_SUFFIXES:
            return f"{file!r} is no file of a tuned lens"
    for file in entry["licenses"]:
        if not re.fullmatch(rf"{LICENSES}/{re.escape(name)}/{PART}", file):
            return f"{file!r} is no licence text of it"
    digests = [*entry["sha256"].values(), *entry["licenses"].values()]
    if not all(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        return "a checksum is no sha256"
    if not is_release_tag(entry["tl_version"]):
        return f"the version is {entry['tl_version']!r}, not vYYYY.MM.DD"
    gates = entry["acceptance"]
    if not isinstance(gates, dict) or sorted(gates) != sorted(GATES):
        return f"acceptance must have {', '.join(GATES)}"
    return None if all(isinstance(passed, bool) for passed in gates.values()) else "a gate is neither true nor false"


def is_release_tag(tag: Any) -> bool:
    """Whether a tag is `vYYYY.MM.DD`, with a date that there is."""
    try:
        return isinstance(tag, str) and datetime.strptime(tag, TAG_FORMAT).strftime(TAG_FORMAT) == tag
    except ValueError:
        return False


def release_tag(tag: str | None = None) -> str:
    """The tag of a release: today's date in UTC, or the one that is asked for.

    Raises:
        ValueError: if that is not `vYYYY.MM.DD`.
    """
    if tag is None:
        return datetime.now(UTC).strftime(TAG_FORMAT)
    if not is_release_tag(tag):
        raise ValueError(f"tag: got {tag!r}; pass a date as vYYYY.MM.DD, such as {release_tag()}")
    return tag
