"""Checks of a tuned lens's folder that need no model: files, checksums, weights, and what the provenance pins."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..data.cache_check import Check
from ..hub.artifact_checks import checksums_check, files_check, made_check, weights_check
from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from .depth import DEPTHS
from .gates import judge_figures
from .index import GATES
from .kpis import COVERAGE, DELTA, EARLIER_BY, EARLIER_SHARE, EARLINESS, LAST_LAYER
from .lens_places import CONFIG_FILE, is_own

# What a release must name, so that the fit can be repeated.
PINNED = ("model_id", "clean_model_name", "seed", "dataset", "budget", "capacity", "translator")
PINNED_HASHES = ("weights_hash", "tokenizer_hash")
DATASET_PINS = ("repo_id", "content_hash")
FULL = "full"  # the rank of translators that are whole matrices, as the provenance has it
BUDGET_PINS = ("tokens", "seq_len", "positions_per_seq")
KPI_NAMES = (DELTA, EARLINESS, EARLIER_SHARE, LAST_LAYER, COVERAGE)


class TunedLensFolder(NamedTuple):
    """What the JSON files of a tuned lens say."""

    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]


def find_tuned_lenses(path: str | Path) -> list[Path]:
    """The folders of the tuned lenses at `path` or below it, hidden folders aside.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if is_own(path):
        return [path]
    configs = sorted(path.rglob(CONFIG_FILE)) if path.is_dir() else []
    visible = [file.parent for file in configs if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    found = [folder for folder in visible if is_own(folder)]
    # a fit's own checkpoints lie inside its folder
    found = [folder for folder in found if not any(other in folder.parents for other in found)]
    if not found:
        raise ValueError(
            f"path: no tuned lens at {str(path)!r} or below it; fit one with: consistency-lens tuned-lens fit"
        )
    return found


def read_tuned_lens(path: Path) -> TunedLensFolder:
    """The JSON files of a tuned lens.

    Raises:
        ValueError: if one is missing, or no JSON mapping.
    """
    contents = []
    for name in (CONFIG_FILE, PROVENANCE_FILE):
        file = path / name
        if not file.is_file():
            raise ValueError(f"path: no {name} in {str(path)!r}; pass the folder of a fitted tuned lens")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"path: {name} in {str(path)!r} is no JSON ({error}); fit the lens again") from error
        if not isinstance(content, dict):
            raise ValueError(f"path: {name} in {str(path)!r} holds no mapping; fit the lens again")
        contents.append(content)
    return TunedLensFolder(path, *contents)


def content_checks(path: str | Path) -> list[Check]:
    """Checks a folder by itself: `files`, `checksums`, `weights`, `provenance`, `configuration`, `gates`."""
    path = Path(path)
    try:
        folder = read_tuned_lens(path)
    except ValueError as error:
        return [Check("files", False, str(error))]
    return [
        files_check(path),
        _checksums_check(folder),
        weights_check(path),
        _provenance_check(folder.provenance),
        _configuration_check(folder),
        _gates_check(folder.provenance),
    ]


def _checksums_check(folder: TunedLensFolder) -> Check:
    recorded = folder.provenance.get("sha256")
    if not isinstance(recorded, dict) or WEIGHTS_FILE not in recorded:
        return Check("checksums", False, f"{PROVENANCE_FILE} has no sha256 of {WEIGHTS_FILE}")
    return checksums_check(folder.path, recorded, f"sha256 of {', '.join(recorded)}")


def _provenance_check(provenance: Mapping[str, Any]) -> Check:
    """Whether all is named that a release must name."""
    problems = [f"lacks {name}" for name in (*PINNED, *PINNED_HASHES) if provenance.get(name) in (None, "", {})]
    parts = {"dataset": DATASET_PINS, "budget": BUDGET_PINS}
    for part, names in parts.items():
        found = provenance.get(part)
        if found is not None and not isinstance(found, dict):
            problems.append(f"{part} is no mapping")
        elif found:
            problems += [f"lacks {part}.{name}" for name in names if found.get(name) in (None, "")]
    if (provenance.get("model_commit") is None) != (provenance.get("tokenizer_commit") is None):
        problems.append("names the commit of one of model and tokenizer alone")
    commits = [provenance.get(name) for name in ("model_commit", "tokenizer_commit")]
    problems += [f"{commit!r} is no commit" for commit in commits if commit is not None and not _is_commit(commit)]
    pinned = f"{provenance.get('model_id')} at {commits[0] or 'no commit: a local folder'}"
    return made_check("provenance", problems, pinned)


def _is_commit(commit: Any) -> bool:
    return isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) is not None


def _configuration_check(folder: TunedLensFolder) -> Check:
    """Whether configuration and provenance tell of one model and one rank."""
    config, provenance = folder.config, folder.provenance
    translator = provenance.get("translator")
    rank = translator.get("rank") if isinstance(translator, dict) else None
    pairs = {
        "model": (config.get("base_model_name_or_path"), provenance.get("model_id")),
        "revision": (config.get("base_model_revision"), provenance.get("model_commit")),
        "rank": (config.get("rank") or FULL, rank),
    }
    problems = [
        f"{name}: {one!r} in {CONFIG_FILE}, {other!r} in {PROVENANCE_FILE}"
        for name, (one, other) in pairs.items()
        if one != other
    ]
    return made_check(
        "configuration", problems, f"rank {config.get('rank') or 'full'}, {config.get('num_layers')} layers"
    )


def _gates_check(provenance: Mapping[str, Any]) -> Check:
    """Whether the gates were judged, and as the figures beside them say; whether they passed does not matter here."""
    kpis, acceptance = provenance.get("kpis"), provenance.get("acceptance")
    if not kpis or not acceptance:
        return Check("gates", False, "not judged yet: run consistency-lens tuned-lens gates")
    if not isinstance(kpis, dict) or not isinstance(acceptance, dict):
        return Check("gates", False, "kpis and acceptance must be mappings")
    missing = [f"lacks kpis.{name}" for name in KPI_NAMES if name not in kpis]
    if missing:
        return Check("gates", False, "\n".join(missing))
    deltas, shares, last_layer = kpis[DELTA], kpis[EARLIER_SHARE], kpis[LAST_LAYER]
    counts = {DELTA: (deltas, len(DEPTHS)), EARLIER_SHARE: (shares, len(EARLIER_BY)), LAST_LAYER: ([last_layer], 1)}
    problems = [
        f"kpis.{name}: {kpis[name]!r} is not as gates are judged by"
        for name, (figures, count) in counts.items()
        if not _are_figures(figures, count, may_lack=name == EARLIER_SHARE)
    ]
    if problems:
        return Check("gates", False, "\n".join(problems))
    follows = judge_figures(deltas, shares, last_layer).as_dict()
    problems = [
        f"{gate} is {acceptance.get(gate)}, and {follows[gate]} by the figures beside it"
        for gate in GATES
        if acceptance.get(gate) is not follows[gate]
    ]
    found = ", ".join(f"{gate[-1]} {'passed' if acceptance.get(gate) else 'not passed'}" for gate in GATES)
    return made_check("gates", problems, f"as judged: {found}")


def _are_figures(figures: Any, count: int, may_lack: bool) -> bool:
    """Whether these are so many numbers, or None where they may lack."""
    return (
        isinstance(figures, list)
        and len(figures) == count
        and all(type(of) in (int, float) or (may_lack and of is None) for of in figures)
    )
