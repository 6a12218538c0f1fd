"""Fetching lenses from a repository that `push_lenses` filled: at a revision, every file checked, all or nothing.

A lens takes its place when all its files have their checksums, its weights are finite, its configuration is the one
that the index tells of, and its base model, where that is at hand and small, has the weights that it was trained on.
None of its code runs here.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .artifact_checks import raise_if_failed
from .download import download_folder
from .index import INDEX_FILE, is_pickled
from .lens_checks import base_at_hand, base_checks, content_checks, index_checks, load_base
from .lens_collection import LensRepository, list_lenses
from .lens_index import LensEntry, index_text

logger = logging.getLogger(__name__)

# bytes of a base model's weights that are compared without being asked for
CHEAP = 2**29


class PulledLens(NamedTuple):
    """A lens that is here now."""

    name: str
    path: Path
    """Its folder, for `AutoModel.from_pretrained`."""
    entry: LensEntry
    commit: str
    """Of the repository."""
    is_new: bool
    """False if it was here already."""


def pull_lenses(
    repo: str, path: str | Path, *, lens: str | None = None, revision: str | None = None, progress: bool = True
) -> list[PulledLens]:
    """Fetches a lens, or all that a repository holds; what is here already is left alone.

    Args:
        repo: id of the model repository.
        path: folder of the lens; without `lens`, of a collection, the folder that gets one for each.
        lens: name of one, as `INDEX.json` has it; by default all.
        revision: tag of a release, commit or branch; default: main, or the newest release that was finished.

    Raises:
        ValueError: if there is no such repository, revision or lens, its index is not as it must be, it holds a file
            that may run code when it is read, or the folder holds something else.
        VerificationError: if a lens is not what the index says, or its base model is another; nothing is left then.
        HubError: if the Hub cannot be reached, or fails; the next call goes on.
        OSError: if a file cannot be written.
    """
    path = Path(path)
    found = list_lenses(repo, revision)
    if lens is not None and lens not in found.entries:
        raise ValueError(f"lens: {repo!r} has {', '.join(found.entries) or 'none'}, not {lens!r}; pass one of them")
    chosen = found.entries if lens is None else {lens: found.entries[lens]}
    _check_none_pickled(found, chosen)
    root, kept = "", chosen
    if lens is not None:
        root = chosen[lens].root
        kept = {lens: _at_root(chosen[lens])}
    wanted = {file: record for entry in chosen.values() for file, record in entry.paths.items()}
    is_new = download_folder(
        found.source,
        wanted,
        path,
        root=root,
        own={INDEX_FILE: index_text(kept).encode()},
        check=lambda folder: _check(folder, kept),
        progress=progress,
    )
    return [PulledLens(name, path / kept[name].path, entry, found.commit, is_new) for name, entry in chosen.items()]


def _at_root(entry: LensEntry) -> LensEntry:
    """The entry of a lens that is fetched alone."""
    return LensEntry(**{**vars(entry), "path": ""})


def _check_none_pickled(found: LensRepository, chosen: Mapping[str, LensEntry]) -> None:
    """Raises a ValueError for a repository that tempts somebody to load a pickle."""
    roots = tuple(entry.root for entry in chosen.values())
    for file in sorted(found.files):
        if file.startswith(roots) and is_pickled(file):
            raise ValueError(
                f"repo: {found.repo!r} holds {file!r}, which is pickled and may run code when it is read; pull "
                "another revision, or ask its owner for safetensors alone"
            )


def _check(folder: Path, kept: Mapping[str, LensEntry]) -> None:
    """What has to hold before lenses take their place."""
    for name, entry in kept.items():
        place = folder / entry.path
        checks = [*content_checks(place), *index_checks(place, entry)]
        raise_if_failed(checks, f"lens: {name!r}")
        base = base_at_hand(place)
        if base is None or sum(file.stat().st_size for file in base.glob("*.safetensors")) > CHEAP:
            continue
        try:
            subject = load_base(place, str(base))
        except ValueError as error:  # such as a cache of the Hub without its tokenizer
            logger.info("the base model of %s is not compared: %s", name, error)
            continue
        raise_if_failed(base_checks(place, subject), f"lens: {name!r}")
