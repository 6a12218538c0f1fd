"""Fetching tuned lenses from a repository that `publish` filled: at a revision, every file against its checksum."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..hub.download import DATASET, FileRecord, download_folder
from ..hub.index import INDEX_FILE, IndexedRepository, open_index
from .index import IndexEntry, index_text, read_index

TunedLensRepository = IndexedRepository[IndexEntry]


class DownloadedTunedLens(NamedTuple):
    """A tuned lens that is here now."""

    model: str
    path: Path
    """Its folder, for `TunedLens.from_pretrained`."""
    tl_version: str
    commit: str
    """Of the repository."""
    is_new: bool
    """False if it was here already."""


def list_tuned_lenses(repo: str, revision: str | None = None, also_unfinished: bool = False) -> TunedLensRepository:
    """What a repository holds, model -> its lens; see `hub.index.open_index`.

    Args:
        repo: id of the data set.
        revision: tag of a release, commit or branch; default: main, or the newest release that was finished.
        also_unfinished: whether main is taken as it is.

    Raises:
        ValueError: if there is no such repository or revision, or it holds no tuned lenses.
        VerificationError: if the index was damaged on its way.
        HubError: if the Hub cannot be reached, or fails.
    """
    return open_index(repo, DATASET, revision, read_index, "tuned lenses", also_unfinished)


def download_tuned_lens(
    repo: str, path: str | Path, *, model: str | None = None, revision: str | None = None, progress: bool = True
) -> list[DownloadedTunedLens]:
    """Fetches a tuned lens, or all that a repository holds; what is here already is left alone.

    Args:
        repo: id of the data set.
        path: with `model` the folder of its lens, else the folder for `INDEX.json`, `LICENSES` and `tuned_lenses`.
        model: as `INDEX.json` names it; by default all.
        revision: tag of a release, commit or branch; default: main, or the newest release that was finished.

    Raises:
        ValueError: if there is no such repository, revision or model, or the folder holds something else.
        VerificationError: if a file is not what the index says; nothing is left then.
        HubError: if the Hub cannot be reached, or fails.
        OSError: if a file cannot be written.
    """
    path = Path(path)
    found = list_tuned_lenses(repo, revision)
    if model is not None and model not in found.entries:
        raise ValueError(f"model: {repo!r} has {', '.join(found.entries) or 'none'}, not {model!r}; pass one of them")
    chosen: Mapping[str, IndexEntry] = found.entries
    wanted, root, own = {}, "", {}
    if model is None:
        own = {INDEX_FILE: index_text(chosen).encode()}
        wanted = {name: record for entry in chosen.values() for name, record in entry.files.items()}
    else:
        # the texts of the licences come with the tree alone; the NOTICE in the folder links them
        chosen, root = {model: found.entries[model]}, f"{found.entries[model].path}/"
        wanted = {f"{root}{name}": FileRecord(digest) for name, digest in found.entries[model].sha256.items()}
    is_new = download_folder(found.source, wanted, path, root=root, own=own, progress=progress)
    folders = {name: path if model is not None else path / entry.path for name, entry in chosen.items()}
    return [
        DownloadedTunedLens(name, folders[name], entry.tl_version, found.commit, is_new)
        for name, entry in chosen.items()
    ]
