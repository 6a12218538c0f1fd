"""Fetching tuned lenses from a repository that `publish` filled: at a revision, every file against its checksum.

What comes lies under a hidden name beside the folder it is for, and takes that folder's name when all of it is there
and checked; a download that broke off goes on there.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from tqdm.auto import tqdm

from ..atomic_write import sync_folder
from ..data.activation_cache import file_hash
from ..hub_connection import asking_hub
from .index import INDEX_FILE, IndexEntry, TunedLensVerificationError, index_text, is_release_tag, read_index

# what `huggingface_hub` keeps beside its files to go on with a download
ITS_RECORDS = ".cache"


class TunedLensRepository(NamedTuple):
    """What a repository holds at a revision."""

    repo: str
    commit: str
    entries: Mapping[str, IndexEntry]
    """Model -> its lens."""
    tags: tuple[str, ...]
    """All its releases, in order."""


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


def list_tuned_lenses(repo: str, revision: str | None = None) -> TunedLensRepository:
    """What a repository holds.

    Args:
        repo: id of the data set.
        revision: tag of a release, commit or branch; default: main.

    Raises:
        ValueError: if there is no such repository or revision, or it holds no tuned lenses.
        HubError: if the Hub cannot be reached, or fails.
    """
    api = HfApi()
    with asking_hub(repo, revision):
        info = api.dataset_info(repo, revision=revision)
    if info.sha is None or INDEX_FILE not in {sibling.rfilename for sibling in info.siblings or []}:
        raise ValueError(f"repo: {repo!r} holds no tuned lenses (no {INDEX_FILE}); pass one that does")
    with asking_hub(repo, revision):
        refs = api.list_repo_refs(repo, repo_type="dataset")
        file = Path(api.hf_hub_download(repo, INDEX_FILE, repo_type="dataset", revision=info.sha))
    tags = sorted(tag.name for tag in refs.tags if is_release_tag(tag.name))
    return TunedLensRepository(repo, info.sha, read_index(file.read_bytes(), repo), tuple(tags))


def download_tuned_lens(
    repo: str, path: str | Path, *, model: str | None = None, revision: str | None = None, progress: bool = True
) -> list[DownloadedTunedLens]:
    """Fetches a tuned lens, or all that a repository holds; what is here already is left alone.

    Args:
        repo: id of the data set.
        path: with `model` the folder of its lens, else the folder for `INDEX.json`, `LICENSES` and `tuned_lenses`.
        model: as `INDEX.json` names it; by default all.
        revision: tag of a release, commit or branch; default: main.

    Raises:
        ValueError: if there is no such repository, revision or model, or the folder holds something else.
        TunedLensVerificationError: if a file is not what the index says; nothing is left then.
        HubError: if the Hub cannot be reached, or fails.
        OSError: if a file cannot be written.
    """
    path = Path(path)
    found = list_tuned_lenses(repo, revision)
    if model is not None and model not in found.entries:
        raise ValueError(f"model: {repo!r} has {', '.join(found.entries) or 'none'}, not {model!r}; pass one of them")
    if model is None:
        chosen, root = found.entries, ""
        wanted = {name: digest for entry in chosen.values() for name, digest in entry.files.items()}
    else:
        # the texts of the licences come with the tree alone; the NOTICE in the folder links them
        chosen, root = {model: found.entries[model]}, f"{found.entries[model].path}/"
        wanted = {f"{root}{name}": digest for name, digest in found.entries[model].sha256.items()}
    is_new = not _is_here(path, {name.removeprefix(root): digest for name, digest in wanted.items()})
    if is_new:
        _check_empty(path)
        partial = _download(found, wanted, path, progress)
        if model is None:
            (partial / INDEX_FILE).write_text(index_text(found.entries), encoding="utf-8")
        _take_name(partial, root, path)
    folders = {name: path if model is not None else path / entry.path for name, entry in chosen.items()}
    return [
        DownloadedTunedLens(name, folders[name], entry.tl_version, found.commit, is_new)
        for name, entry in chosen.items()
    ]


def _is_here(path: Path, wanted: Mapping[str, str]) -> bool:
    """Whether a folder has all these files, with these checksums."""
    return all((path / name).is_file() and file_hash(path / name) == digest for name, digest in wanted.items())


def _check_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path: {str(path)!r} holds something else; choose another folder or delete that one")


def _download(found: TunedLensRepository, wanted: Mapping[str, str], path: Path, progress: bool) -> Path:
    """The folder of the hidden name with all files in it, checked."""
    # of the commit, so that nothing of another one is in it
    partial = path.with_name(f".{path.name}.{found.commit[:12]}.partial")
    bar = tqdm(wanted.items(), desc=f"downloading {found.repo}", unit=" files", disable=not progress)
    for name, digest in bar:
        fetch_checked(found, name, digest, partial)
    return partial


def fetch_checked(found: TunedLensRepository, name: str, digest: str, folder: Path) -> Path:
    """Fetches one file of a repository into a folder.

    Raises:
        TunedLensVerificationError: if it has another checksum; the folder is removed.
    """
    with asking_hub(found.repo, found.commit):
        file = Path(
            HfApi().hf_hub_download(found.repo, name, repo_type="dataset", revision=found.commit, local_dir=folder)
        )
    actual = file_hash(file)
    if actual != digest:
        shutil.rmtree(folder)
        raise TunedLensVerificationError(
            f"tuned lens: {name} of {found.repo!r} has sha256 {actual[:12]}…, not {digest[:12]}… as {INDEX_FILE} "
            "says; it was changed or damaged, pass another revision"
        )
    return file


def _take_name(partial: Path, root: str, path: Path) -> None:
    """Moves what was fetched to its place, in one step."""
    shutil.rmtree(partial / ITS_RECORDS, ignore_errors=True)
    source = partial / root
    sync_folder(source)
    os.rename(source, path)  # over an empty folder, if there is one
    shutil.rmtree(partial, ignore_errors=True)
