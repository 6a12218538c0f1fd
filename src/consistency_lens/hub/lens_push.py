"""Publishing lenses, decoders and encoders on the Hub: their files and the code that loads them, cards, INDEX.json.

A release is one commit and a tag that never moves. A lone lens lies at the root of a model repository, so that
`AutoModel.from_pretrained(repo)` finds it; of a collection each has a folder. What the repository holds of others
stays as it is.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi

from ..data.activation_cache import file_hash
from ..hub_connection import asking_hub
from ..hub_upload import ARTIFACT_FILES, CONFIG_FILE, check_no_token, stage_artifact
from ..public_names import is_path
from ..version import __version__
from .artifact_checks import raise_if_failed
from .download import MODEL, FileRecord, Snapshot
from .index import INDEX_FILE, PART
from .lens_card import write_lens_card
from .lens_checks import MODELS, content_checks, find_lenses, model_type
from .lens_collection import LensRepository, collection_card, list_lenses
from .lens_folder import read_lens_folder
from .lens_index import FIGURES, BaseModel, LensEntry, index_text
from .releases import look_at, release_tag, upload_release
from .staging_folder import StagingFolder
from .upstream_license import UpstreamLicense, upstream_license

CARD = "README.md"
# what a repository may have before there is a model in it
BEFORE_A_MODEL = (".gitattributes", CARD, "LICENSE*", "NOTICE*")


class PushedLenses(NamedTuple):
    """What a release has done."""

    url: str
    commit: str | None
    """None for a dry run."""
    tag: str
    lenses: Mapping[str, LensEntry]
    """Name in INDEX.json -> what was pushed."""
    replaced: Mapping[str, str]
    """Of those that were there before, the release that still has them."""
    folder: Path | None
    """Where a dry run left what it would upload."""


def push_lenses(
    path: str | Path,
    repo: str,
    *,
    name: str | None = None,
    private: bool = False,
    license: str | None = None,
    license_files: Sequence[str | Path] = (),
    tag: str | None = None,
    dry_run: bool = False,
) -> PushedLenses:
    """Publishes a lens, decoder or encoder, or all that lie below a folder, as one release.

    Args:
        path: folder of a lens, or with such below it.
        repo: id of the model repository, `user/name` or `organisation/name`; made if it is not there.
        name: folder in the repository; by default the root for a lone lens, else the name of the lens's own folder.
        private: whether only its owner may see it.
        license, license_files: the licence of the base model and its texts; by default what the model's own
            repository or folder has.
        tag: of the release, `vYYYY.MM.DD`; default: today in UTC.
        dry_run: do all but the upload.

    Raises:
        ValueError: for a user's mistake, such as a path without a lens, a tag that is there, a repository that holds
            something else, a token that does not do or stands in a file, or a licence that the Hub does not know.
        VerificationError: if a lens does not pass `content_checks`; nothing is uploaded.
        HubError: if the Hub cannot be reached, or fails.
        OSError: if the staged files cannot be written.
    """
    tag = release_tag(tag)
    path = Path(path).resolve()
    folders = _lenses_at(path)
    before = _look_at(repo, tag, private, dry_run)
    known = before.entries if before is not None else {}
    places = _places(folders, repo, name, known)
    url = f"{HfApi().endpoint}/{repo}"
    with StagingFolder(path.with_name(f".{path.name}.push")) as staging:
        upload = staging.path / "upload"
        entries = {
            named: stage_lens(folder, place, upload / place, repo, tag, license, license_files)
            for named, (folder, place) in places.items()
        }
        merged = {**known, **entries}
        if "" not in (entry.path for entry in merged.values()):
            (upload / CARD).write_text(collection_card(repo, tag, merged), encoding="utf-8")
        (upload / INDEX_FILE).write_text(index_text(merged), encoding="utf-8")
        check_no_token(upload)
        replaced = {named: known[named].release for named in entries if named in known}
        if dry_run:
            return PushedLenses(url, None, tag, entries, replaced, upload)
        commit = upload_release(
            upload,
            repo,
            MODEL,
            tag,
            ", ".join(entries),
            before=before.source if before is not None else None,
            unfinished=before.unfinished if before is not None else None,
            replaced=[file for named in replaced for file in known[named].paths],
            private=private,
        )
        staging.remove()
    return PushedLenses(url, commit, tag, entries, replaced, None)


def _lenses_at(path: Path) -> list[Path]:
    """The folders of the lenses, each of them checked."""
    folders = find_lenses(path)
    if not folders:
        raise ValueError(f"path: no lens, decoder or encoder at {str(path)!r} or below it; pass the folder of one")
    for folder in folders:
        raise_if_failed(content_checks(folder), f"lens: {str(folder)!r}")
    return folders


def _look_at(repo: str, tag: str, private: bool, dry_run: bool) -> LensRepository | None:
    """What the repository holds, None if it is new; checks that nothing of another kind would be lost."""
    found = look_at(repo, MODEL, tag, private, dry_run)
    if found is None:
        return None
    source, files = found
    if INDEX_FILE in files:
        return list_lenses(repo, also_unfinished=True)
    # a training may have pushed the lens already, without an index
    own = {file for file in files if any(Path(file).match(pattern) for pattern in (*ARTIFACT_FILES, "*.py"))}
    others = [
        file for file in files - own - {".gitattributes"} if not file.startswith(("checkpoint-", "last-checkpoint/"))
    ]
    if others:
        raise ValueError(f"repo: {repo!r} holds something that is no lens ({min(others)}); choose another name")
    if not all(any(fnmatch(file, pattern) for pattern in BEFORE_A_MODEL) for file in files):
        # other models have files of the same names, which would be overwritten
        kind = _kind_at_root(source, files)
        if kind not in MODELS:
            told = "files, but no lens" if kind is None else f"a model of type {kind!r} that is no lens"
            raise ValueError(f"repo: {repo!r} holds {told}; choose another name")
    return LensRepository(source, {}, (), files)


def _kind_at_root(source: Snapshot, files: frozenset[str]) -> str | None:
    """What kind of model lies at the root of a repository; None if no configuration there says it."""
    if CONFIG_FILE not in files:
        return None
    with asking_hub(source.repo, source.commit):
        file = HfApi().hf_hub_download(source.repo, CONFIG_FILE, revision=source.commit)
    return model_type(Path(file).parent)


def _places(
    folders: Sequence[Path], repo: str, name: str | None, known: Mapping[str, LensEntry]
) -> dict[str, tuple[Path, str]]:
    """Name in INDEX.json -> folder here, and in the repository."""
    if name is not None and len(folders) > 1:
        raise ValueError(f"name: got {name!r} for {len(folders)} lenses; leave it out, their folders name them")
    lone = next((named for named, entry in known.items() if entry.path == ""), None)
    own = repo.rpartition("/")[2]
    if len(folders) == 1 and name is None and (not known or lone is not None):
        return {lone or own: (folders[0], "")}
    if lone is not None:
        raise ValueError(f"repo: {repo!r} holds a lone lens at its root; push to another, which can hold several")
    places: dict[str, tuple[Path, str]] = {}
    for folder in folders:
        named = name or folder.name
        if not re.fullmatch(PART, named):
            raise ValueError(f"name: {named!r} cannot be that of a folder on the Hub; pass name, or rename the folder")
        if named in places:
            raise ValueError(f"path: two lenses lie in folders named {named!r}; rename one")
        places[named] = (folder, named)
    return places


def stage_lens(
    folder: Path,
    place: str,
    target: Path,
    repo: str,
    tag: str,
    license: str | None = None,
    license_files: Sequence[str | Path] = (),
) -> LensEntry:
    """Writes what a release has of one lens.

    Args:
        folder: of the lens.
        place: its folder in the repository; empty for the root.
        target: the folder that is uploaded there.
        license, license_files: of the base model, see `push_lenses`.

    Returns:
        Its entry for INDEX.json.
    """
    lens = read_lens_folder(folder)
    stage_artifact(folder, target, MODELS[lens.config.model_type])
    named = lens.clone.base_model_name_or_path
    local = lens.base_revision is None and is_path(named)
    found = UpstreamLicense(license, None, None, {})
    if local or lens.base_revision is not None:
        found = upstream_license(named, lens.base_revision, license, license_files)
    for file, text in found.texts.items():
        (target / file).unlink(missing_ok=True)  # it may be a link to the lens's own
        (target / file).write_bytes(text)
    (target / CARD).unlink(missing_ok=True)
    write_lens_card(target, repo, subfolder=place or None, revision=tag, license=found)
    staged = read_lens_folder(target)
    measured = {
        figure: staged.metrics[figure] for figure in FIGURES if type(staged.metrics.get(figure)) in (int, float)
    }
    base = staged.clone.base_model_name_or_path
    return LensEntry(
        path=place,
        kind=staged.config.model_type,
        release=tag,
        base_model=BaseModel(base, staged.base_revision, staged.data.get("weights_hash")),
        layer=staged.clone.layer,
        num_text_tokens=staged.clone.num_text_tokens,
        metrics=measured,
        package_version=__version__,
        license=found.name,
        files={file.name: FileRecord(file_hash(file), file.stat().st_size) for file in sorted(target.iterdir())},
    )
