"""Releases: one commit and one tag `vYYYY.MM.DD` that never moves, upon a repository that was looked at before."""

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError

from ..hub_connection import HubError, asking_hub
from .download import MODEL, Snapshot

TAG_FORMAT = "v%Y.%m.%d"


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


def look_at(repo: str, kind: str, tag: str, private: bool, dry_run: bool) -> tuple[Snapshot, frozenset[str]] | None:
    """Checks that the token does, and that no release would change or be shown; uploads nothing.

    Returns:
        What the repository's main branch is at, and its files; None if it is not there.

    Raises:
        ValueError: for a tag that is there, a repository that is public and should not be, or a token that does not
            do.
        HubError: if the Hub cannot be reached, or fails.
    """
    with asking_hub(repo):
        if not dry_run:
            HfApi().whoami()
        try:
            info = repository_info(repo, kind)
        except RepositoryNotFoundError:
            return None
    check_new_tag(repo, kind, tag)
    if private and not info.private:
        raise ValueError(f"private: {repo!r} is there and public; make it private on the Hub, or publish to another")
    return Snapshot(repo, str(info.sha), kind), frozenset(sibling.rfilename for sibling in info.siblings or [])


def repository_info(repo: str, kind: str, revision: str | None = None) -> ModelInfo | DatasetInfo:
    """What the Hub says of a repository, in the errors of `huggingface_hub`."""
    api = HfApi()
    return api.model_info(repo, revision=revision) if kind == MODEL else api.dataset_info(repo, revision=revision)


def check_new_tag(repo: str, kind: str, tag: str) -> None:
    """Raises a ValueError for a tag that a repository has."""
    if tag in tags_of(repo, kind):
        raise ValueError(f"tag: {repo!r} has {tag} already, and a release never changes; pass another tag")


def tags_of(repo: str, kind: str) -> dict[str, str]:
    """Tag -> commit."""
    with asking_hub(repo):
        refs = HfApi().list_repo_refs(repo, repo_type=kind)
    return {tag.name: tag.target_commit for tag in refs.tags}


def upload_release(
    folder: Path,
    repo: str,
    kind: str,
    tag: str,
    message: str,
    *,
    before: Snapshot | None,
    unfinished: str | None = None,
    replaced: Collection[str] = (),
    private: bool = False,
) -> str:
    """One commit upon what was looked at, and its tag.

    Args:
        folder: what is uploaded.
        message: of the commit, after the tag.
        before: what the repository was at; None to make it.
        unfinished: the release that its index names, if that lacks its tag because whoever made it was stopped; the
            commit that made it gets the tag first, for it is there whole or not at all. One of the same tag is
            replaced instead.
        replaced: paths of what this release replaces; those that it does not have are deleted.

    Returns:
        The commit.

    Raises:
        ValueError: for what the Hub does not take.
        HubError: if the Hub cannot be reached, or fails, or somebody else was faster; no release of it is shown then.
    """
    api = HfApi()
    if before is not None and unfinished is not None and unfinished != tag:
        made = _commit_of(before, unfinished)
        if made is not None:
            add_tag(repo, kind, unfinished, made)
    with asking_hub(repo):
        if before is None:
            api.create_repo(repo, repo_type=kind, private=private)
        pushed = api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"{tag}: {message}",
            parent_commit=before.commit if before is not None else None,
            # what is uploaded again is not deleted
            delete_patterns=sorted(replaced),
        )
    add_tag(repo, kind, tag, pushed.oid)
    return pushed.oid


def _commit_of(source: Snapshot, tag: str) -> str | None:
    """The commit that made a release, as its message says; None if it is gone. Main may have more since."""
    with asking_hub(source.repo, source.commit):
        commits = HfApi().list_repo_commits(source.repo, repo_type=source.kind, revision=source.commit)
    return next((commit.commit_id for commit in commits if commit.title.startswith(f"{tag}: ")), None)


def add_tag(repo: str, kind: str, tag: str, commit: str) -> None:
    """Tags a commit.

    Raises:
        ValueError: if the tag stands at another one.
        HubError: if the Hub cannot be reached, or fails; the same push once more goes on here.
    """
    try:
        with asking_hub(repo):
            HfApi().create_tag(repo, repo_type=kind, tag=tag, revision=commit, tag_message=f"Release {tag}")
    except HubError as error:
        try:
            at = tags_of(repo, kind).get(tag)  # the answer may be all that was lost
        except HubError:
            raise error from None
        if at is None:
            raise
        if at != commit:
            raise ValueError(f"tag: {repo!r} has {tag} already, at another commit; pass another tag") from error
