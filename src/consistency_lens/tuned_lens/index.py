"""INDEX.json: what a repository of tuned lenses holds, with the sha256 of each file.

An entry also has the verdicts of the acceptance gates, the licence of the model, and the licence texts that belong to
it, so that a download can check all that it takes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..data.activation_cache import is_sha256
from ..hub.download import FileRecord
from ..hub.index import INDEX_FILE, PART, is_printable, name_problem, read_mapping
from ..hub.releases import is_release_tag
from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from .lens_places import CONFIG_FILE

TREE, LICENSES = "tuned_lenses", "LICENSES"
NEEDED = (CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE)
LOCAL = "local"  # stands in the place of the organisation for models that are on no Hub
GATES = ("gate_A", "gate_B", "gate_C", "gate_D")
# An organisation may be missing (gpt2).
MODEL_PATTERN = rf"{PART}(/{PART})?"


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
    def release(self) -> str:
        return self.tl_version

    @property
    def files(self) -> dict[str, FileRecord]:
        """Path in the repository -> record, of all that belongs to the lens."""
        hashes = {f"{self.path}/{name}": digest for name, digest in self.sha256.items()} | dict(self.licenses)
        return {name: FileRecord(digest) for name, digest in hashes.items()}


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
    entries = {}
    for name, entry in read_mapping(text, repo).items():
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
    if (problem := name_problem(list(entry["sha256"]), "a tuned lens")) is not None:
        return problem
    for file in entry["licenses"]:
        if not re.fullmatch(rf"{LICENSES}/{re.escape(name)}/{PART}", file):
            return f"{file!r} is no licence text of it"
    digests = [*entry["sha256"].values(), *entry["licenses"].values()]
    if not all(map(is_sha256, digests)):
        return "a checksum is no sha256"
    if not is_release_tag(entry["tl_version"]):
        return f"the version is {entry['tl_version']!r}, not vYYYY.MM.DD"
    if not all(
        entry[key] is None or is_printable(entry[key]) for key in ("model_commit", "tokenizer_commit", "license")
    ):
        return "a commit or the license is no text"
    gates = entry["acceptance"]
    if not isinstance(gates, dict) or sorted(gates) != sorted(GATES):
        return f"acceptance must have {', '.join(GATES)}"
    return None if all(isinstance(passed, bool) for passed in gates.values()) else "a gate is neither true nor false"
