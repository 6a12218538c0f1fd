"""Publishing tuned lenses as a data set on the Hub: a tree of lenses, INDEX.json, licences, cards.

A release is one commit and a tag that never moves. What the repository holds of other models stays as it is.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi

from ..hub.artifact_checks import raise_if_failed
from ..hub.download import DATASET, FileRecord, fetch_checked
from ..hub.index import INDEX_FILE
from ..hub.releases import look_at, release_tag, upload_release
from ..hub.staging_folder import StagingFolder
from ..hub.upstream_license import upstream_license
from ..hub_upload import check_no_token
from ..lens_artifact import PROVENANCE_FILE
from .cards import write_dataset_card
from .content_checks import TunedLensFolder, content_checks, find_tuned_lenses, read_tuned_lens
from .download import TunedLensRepository, list_tuned_lenses
from .index import index_text
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
            holds something else, a token that does not do, a number that is NaN or infinite, or a licence that the
            Hub does not know.
        VerificationError: if a lens does not pass `content_checks`; nothing is uploaded.
        HubError: if the Hub cannot be reached, or fails.
        OSError: if the staged files cannot be written.
    """
    tag = release_tag(tag)
    path = Path(path).resolve()
    lenses = _lenses_at(path)
    if len(lenses) > 1 and (license is not None or license_files):
        raise ValueError(f"license: {len(lenses)} lenses at {str(path)!r} have one each; publish that one by itself")
    before = _look_at(repo, tag, private, dry_run)
    known = before.entries if before is not None else {}
    url = f"{HfApi().endpoint}/datasets/{repo}"
    with StagingFolder(path.with_name(f".{path.name}.publish")) as staging:
        upload = staging.path / "upload"
        entries, provenances = {}, _provenances(before, staging.path / "before")
        for name, folder in lenses.items():
            _check_same_local_model(name, folder, provenances)
            found = upstream_license(folder.provenance["model_id"], _hub_commit(folder), license, license_files)
            entries[name] = stage_lens(folder, name, repo, tag, found, upload)
            provenances[name] = read_tuned_lens(upload / entries[name].path).provenance
        merged = {**known, **entries}
        (upload / INDEX_FILE).write_text(index_text(merged), encoding="utf-8")
        write_dataset_card(upload, repo, tag, merged, provenances)
        shutil.rmtree(staging.path / "before", ignore_errors=True)
        check_no_token(upload)
        models = {name: known[name].tl_version if name in known else None for name in entries}
        if dry_run:
            return PublishedTunedLenses(url, None, tag, models, upload)
        commit = upload_release(
            upload,
            repo,
            DATASET,
            tag,
            ", ".join(entries),
            before=before.source if before is not None else None,
            unfinished=before.unfinished if before is not None else None,
            replaced=[file for name in entries.keys() & known for file in known[name].files],
            private=private,
        )
        staging.remove()
    return PublishedTunedLenses(url, commit, tag, models, None)


def _lenses_at(path: Path) -> dict[str, TunedLensFolder]:
    """Name in INDEX.json -> the lens, each of them checked."""
    lenses: dict[str, TunedLensFolder] = {}
    for folder in find_tuned_lenses(path):
        raise_if_failed(content_checks(folder), f"tuned lens: {str(folder)!r}")
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
    found = look_at(repo, DATASET, tag, private, dry_run)
    if found is None:
        return None
    source, files = found
    if INDEX_FILE in files:
        return list_tuned_lenses(repo, also_unfinished=True)
    if files - {".gitattributes", "README.md"}:
        raise ValueError(f"repo: {repo!r} holds something that is no tuned lenses; choose another name")
    return TunedLensRepository(source, {}, (), files)


def _provenances(before: TunedLensRepository | None, folder: Path) -> dict[str, dict[str, Any]]:
    """Model -> the provenance of the lens that the repository holds."""
    found: dict[str, dict[str, Any]] = {}
    if before is None:
        return found
    for name, entry in before.entries.items():
        for file in (CONFIG_FILE, PROVENANCE_FILE):
            fetch_checked(before.source, f"{entry.path}/{file}", FileRecord(entry.sha256[file]), folder)
        found[name] = read_tuned_lens(folder / entry.path).provenance
    return found


def _check_same_local_model(name: str, folder: TunedLensFolder, known: Mapping[str, Mapping[str, Any]]) -> None:
    """A local model has no commit that tells it from another of its name: its weights have to be the same."""
    if name not in known or _hub_commit(folder) is not None:
        return
    if known[name]["weights_hash"] != folder.provenance["weights_hash"]:
        raise ValueError(f"path: {name!r} in the repository is of another model; rename the folder of this one")
