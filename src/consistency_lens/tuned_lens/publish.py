"""Publishing tuned lenses as a data set on the Hub (plan, section 13): a tree of lenses, INDEX.json, licences, cards.

A release is one commit and a tag that never moves. What the repository holds of other models stays as it is.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..hub.upstream_license import upstream_license
from ..hub_connection import asking_hub
from ..lens_artifact import PROVENANCE_FILE
from .cards import write_dataset_card
from .content_checks import TunedLensFolder, content_checks, find_tuned_lenses, read_tuned_lens
from .download import TunedLensRepository, fetch_checked, list_tuned_lenses
from .index import INDEX_FILE, IndexEntry, TunedLensVerificationError, index_text, release_tag
from .lens_places import CONFIG_FILE
from .public_files import MODEL_KEY, index_name, is_local
from .staging import stage_lens


class PublishedTunedLenses(NamedTuple):
    """What a release has done."""

    url: str
    commit: str | None
    """None for a dry run."""
    tag: str
    models: Mapping[str, str | None]
    """Model -> the version that stood in the repository before, which its own tag still has; None for a new one."""
    folder: Path | None
    """Where a dry run left what it would upload."""


def publish_tuned_lens(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    license_files: Sequence[str | Path] = (),
    tag: str | None = None,
    dry_run: bool = False,
) -> PublishedTunedLenses:
    """Publishes a tuned lens, or all that lie below a folder, as one release.

    Args:
        path: folder of a tuned lens whose gates have been judged, or a folder with such below it.
        repo: id of the data set; made if it is not there.
        private: whether only its owner may see it.
        license, license_files: the licence of the model and its texts, for a single lens; by default what the model's
            own repository or folder has.
        tag: of the release, `vYYYY.MM.DD`; default: today in UTC.
        dry_run: do all but the upload.

    Raises:
        ValueError: for a user's mistake, such as a path without a tuned lens, a tag that is there, a repository that
            holds something else, a token that does not do, or a licence that the Hub does not know.
        TunedLensVerificationError: if a lens does not pass `content_checks`; nothing is uploaded.
        HubError: if the Hub cannot be reached, or fails.
        OSError: if the staged files cannot be written.
    """
    tag = release_tag(tag)
    path = Path(path).resolve()
    lenses = _lenses_at(path)
    if len(lenses) > 1 and (license is not None or license_files):
        raise ValueError(f"license: {len(lenses)} lenses at {str(path)!r} have one each; publish that one by itself")
    before = _look_at(repo, tag, private, dry_run)
    staging = path.with_name(f".{path.name}.publish")
    shutil.rmtree(staging, ignore_errors=True)
    entries, provenances = {}, _provenances(before, staging / "before")
    for name, folder in lenses.items():
        _check_same_local_model(name, folder, provenances)
        found = upstream_license(folder.provenance["model_id"], _hub_commit(folder), license, license_files)
        entries[name] = stage_lens(folder, name, repo, tag, found, staging / "upload")
        provenances[name] = read_tuned_lens(staging / "upload" / entries[name].path).provenance
    known = before.entries if before is not None else {}
    merged = {**known, **entries}
    (staging / "upload" / INDEX_FILE).write_text(index_text(merged), encoding="utf-8")
    write_dataset_card(staging / "upload", repo, tag, merged, provenances)
    shutil.rmtree(staging / "before", ignore_errors=True)
    models = {name: known[name].tl_version if name in known else None for name in entries}
    url = f"{HfApi().endpoint}/datasets/{repo}"
    if dry_run:
        return PublishedTunedLenses(url, None, tag, models, staging / "upload")
    commit = _upload(staging / "upload", repo, tag, entries, before, private)
    shutil.rmtree(staging)
    return PublishedTunedLenses(url, commit, tag, models, None)


def _lenses_at(path: Path) -> dict[str, TunedLensFolder]:
    """Name in INDEX.json -> the lens, each of them checked."""
    lenses: dict[str, TunedLensFolder] = {}
    for folder in find_tuned_lenses(path):
        failed = [check for check in content_checks(folder) if not check.passed]
        if failed:
            told = "; ".join(f"{check.name}: {check.detail.splitlines()[0]}" for check in failed)
            raise TunedLensVerificationError(f"tuned lens: {str(folder)!r} does not pass verification ({told})")
        lens = read_tuned_lens(folder)
        name = index_name(lens.provenance)
        if name in lenses:
            raise ValueError(f"path: {str(lenses[name].path)!r} and {str(folder)!r} are both of {name}; publish one")
        lenses[name] = lens
    return lenses


def _hub_commit(folder: TunedLensFolder) -> str | None:
    return None if is_local(folder.provenance, MODEL_KEY) else folder.provenance["model_commit"]


def _look_at(repo: str, tag: str, private: bool, dry_run: bool) -> TunedLensRepository | None:
    """What the repository holds, None if it is new; checks that the token does, and that nothing would be lost."""
    api = HfApi()
    with asking_hub(repo):
        if not dry_run:
            api.whoami()
        try:
            info = api.dataset_info(repo)
        except RepositoryNotFoundError:
            return None
        refs = api.list_repo_refs(repo, repo_type="dataset")
    if tag in {ref.name for ref in refs.tags}:
        raise ValueError(f"tag: {repo!r} has {tag} already, and a release never changes; pass another tag")
    if private and not info.private:
        raise ValueError(f"private: {repo!r} is there and public; make it private on the Hub, or publish to another")
    files = {sibling.rfilename for sibling in info.siblings or []}
    if INDEX_FILE in files:
        return list_tuned_lenses(repo)
    if files - {".gitattributes", "README.md"}:
        raise ValueError(f"repo: {repo!r} holds something that is no tuned lenses; choose another name")
    return TunedLensRepository(repo, str(info.sha), {}, ())


def _provenances(before: TunedLensRepository | None, folder: Path) -> dict[str, dict[str, Any]]:
    """Model -> the provenance of the lens that the repository holds."""
    found: dict[str, dict[str, Any]] = {}
    if before is None:
        return found
    for name, entry in before.entries.items():
        for file in (CONFIG_FILE, PROVENANCE_FILE):
            fetch_checked(before, f"{entry.path}/{file}", entry.sha256[file], folder)
        found[name] = read_tuned_lens(folder / entry.path).provenance
    return found


def _check_same_local_model(name: str, folder: TunedLensFolder, known: Mapping[str, Mapping[str, Any]]) -> None:
    """A local model has no commit that tells it from another of its name: its weights have to be the same."""
    if name not in known or _hub_commit(folder) is not None:
        return
    if known[name]["weights_hash"] != folder.provenance["weights_hash"]:
        raise ValueError(f"path: {name!r} in the repository is of another model; rename the folder of this one")


def _upload(
    folder: Path,
    repo: str,
    tag: str,
    entries: Mapping[str, IndexEntry],
    before: TunedLensRepository | None,
    private: bool,
) -> str:
    """One commit upon what was looked at, and its tag; returns the commit."""
    api = HfApi()
    known = before.entries if before is not None else {}
    with asking_hub(repo):
        if before is None:
            api.create_repo(repo, repo_type="dataset", private=private)
        pushed = api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            commit_message=f"{tag}: {', '.join(entries)}",
            parent_commit=before.commit if before is not None else None,
            # what is uploaded again is not deleted
            delete_patterns=[file for name in entries.keys() & known for file in known[name].files],
        )
        api.create_tag(repo, repo_type="dataset", tag=tag, revision=pushed.oid, tag_message=f"Tuned lenses {tag}")
    return pushed.oid
