"""Uploads of one folder at once: each has a staging folder of its own, and what killed ones have left goes."""

import errno
import fcntl
import shutil

import pytest
from filelock import FileLock
from hub_server import ORGANISATION
from published_lenses import fit_lens
from published_small_lenses import write_lens
from staging_processes import another_process

from consistency_lens.hub import lens_push
from consistency_lens.hub.staging_folder import StagingFolder, remove_left
from consistency_lens.tuned_lens import publish

REPO = f"{ORGANISATION}/two-pushes"


def folders(place):
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def test_the_folder_of_another_process_is_neither_taken_nor_removed(tmp_path):
    with another_process(tmp_path / ".push") as (_, taken):
        with StagingFolder(tmp_path / ".push") as staging:
            assert (taken, staging.path.name) == (".push", ".push-2")
            remove_left(tmp_path / ".push")
            assert staging.path.is_dir()
            staging.remove()
        assert folders(tmp_path) == [".push"]
        assert (tmp_path / ".push" / "file").read_text() == "being uploaded"


def test_what_a_killed_process_has_left_goes(tmp_path):
    with (
        another_process(tmp_path / ".push") as (first, _),
        another_process(tmp_path / ".push") as (second, other),
        StagingFolder(tmp_path / ".push") as third,
    ):
        assert (other, third.path.name) == (".push-2", ".push-3")
        for process in (first, second):
            process.kill()
            process.wait()
        (tmp_path / ".pushed").mkdir()
        (tmp_path / ".push-notes").mkdir()
        with StagingFolder(tmp_path / ".push") as again:
            assert again.path.name == ".push" and not (again.path / "file").exists()
            assert folders(tmp_path) == [".push", ".push-3", ".push-notes", ".pushed"]
    remove_left(tmp_path / ".push")
    assert folders(tmp_path) == [".push-notes", ".pushed"]


def test_whoever_opened_the_lock_before_it_was_released_shuts_out_the_next(tmp_path):
    """Releases of `filelock` and network file systems differ in whether a lock on a file that went is told of."""
    first = StagingFolder(tmp_path / ".push")
    with open(tmp_path / ".push.lock") as waiting:
        first.remove()
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with StagingFolder(tmp_path / ".push") as staging:
            assert staging.path.name == ".push-2"


def test_a_folder_goes_after_an_exception_and_stays_without_one(tmp_path):
    with pytest.raises(KeyboardInterrupt), StagingFolder(tmp_path / ".push"):
        raise KeyboardInterrupt
    assert folders(tmp_path) == []
    with StagingFolder(tmp_path / ".push"):
        pass
    assert folders(tmp_path) == [".push"]


@pytest.mark.parametrize("removed", [False, True])
def test_a_folder_that_was_released_is_neither_removed_nor_released_again(tmp_path, removed):
    with StagingFolder(tmp_path / ".push") as first:
        if removed:
            first.remove()
    with StagingFolder(tmp_path / ".push") as staging:
        first.remove()
        assert staging.path.name == ".push" and staging.path.is_dir()
        assert StagingFolder(tmp_path / ".push").path.name == ".push-2"


def test_no_folder_is_taken_that_holds_what_cannot_be_removed(tmp_path, monkeypatch):
    (tmp_path / ".push").mkdir()
    (tmp_path / ".push" / "old").touch()
    (tmp_path / ".push-2").touch()
    remove = shutil.rmtree

    def deny(path, ignore_errors=False):
        if path != tmp_path / ".push":
            remove(path, ignore_errors)
        elif not ignore_errors:
            raise PermissionError(errno.EACCES, "of another user")

    monkeypatch.setattr(shutil, "rmtree", deny)
    with StagingFolder(tmp_path / ".push") as staging:
        assert staging.path.name == ".push-3" and not list(staging.path.iterdir())


def test_a_lock_of_another_user_is_a_place_taken_and_a_place_without_locks_an_error(tmp_path, monkeypatch):
    acquire, denied = FileLock.acquire, [".push.lock"]

    def deny(lock, **arguments):
        if any(name in lock.lock_file for name in denied):
            raise PermissionError(errno.EACCES, "of another user")
        return acquire(lock, **arguments)

    (tmp_path / ".push").mkdir()
    (tmp_path / ".push.lock").touch()
    monkeypatch.setattr(FileLock, "acquire", deny)
    with StagingFolder(tmp_path / ".push") as staging:
        assert staging.path.name == ".push-2"
        assert folders(tmp_path) == [".push", ".push-2"]
    denied.append(".push-3.lock")
    with StagingFolder(tmp_path / ".push"), pytest.raises(PermissionError):
        StagingFolder(tmp_path / ".push")  # nothing can be made here, under no number

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"):
        StagingFolder(tmp_path / ".other")
    (tmp_path / ".other").mkdir()
    remove_left(tmp_path / ".other")
    assert ".other" in folders(tmp_path)


def lens_to_push(folder):
    return lens_push.push_lenses, write_lens(folder / "lens", base="a-local-model", revision=None)


def tuned_lens_to_push(folder):
    return publish.publish_tuned_lens, fit_lens(folder).path


@pytest.mark.parametrize(
    ("make", "upload"),
    [
        (lens_to_push, (lens_push, "upload_release")),
        (tuned_lens_to_push, (publish, "upload_release")),
    ],
)
def test_a_push_leaves_alone_what_another_one_uploads(hub, tmp_path, monkeypatch, make, upload):
    push, path = make(tmp_path)
    uploads, others = getattr(*upload), []

    def inodes(folder):
        return {file: file.stat().st_ino for file in folder.rglob("*")}

    def upload_while_another_stages(folder, *args, **kwargs):
        before = inodes(folder)
        others.append(push(path, REPO, dry_run=True).folder.parent)
        assert inodes(folder) == before
        return uploads(folder, *args, **kwargs)

    monkeypatch.setattr(*upload, upload_while_another_stages)
    assert push(path, REPO).commit is not None
    (other,) = others
    assert other.is_dir() and other.name.endswith("-2")
    assert not (path.parent / other.name.removesuffix("-2")).exists()
