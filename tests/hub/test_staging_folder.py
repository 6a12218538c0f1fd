"""Uploads of one folder at once: each has a staging folder of its own, and what killed ones have left goes."""

import pytest
from hub_server import ORGANISATION
from published_lenses import fit_lens
from published_small_lenses import write_lens
from staging_processes import another_process

from consistency_lens.hub import lens_push
from consistency_lens.hub.staging_folder import StagingFolder, remove_left
from consistency_lens.tuned_lens import publish

REPO = f"{ORGANISATION}/two-pushes"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_of_another_process_is_neither_taken_nor_removed(tmp_path):
    with another_process(tmp_path / ".push") as (_, taken):
        with StagingFolder(tmp_path / ".push") as staging:
            assert (taken, staging.path.name) == (".push", ".push-2")
            remove_left(tmp_path / ".push")
            assert staging.path.is_dir()
            staging.remove()
        assert names(tmp_path) == [".push", ".push.lock"]
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
            others = {".push-notes", ".pushed"}
            assert set(names(tmp_path)) == {".push", ".push.lock", ".push-3", ".push-3.lock"} | others
    remove_left(tmp_path / ".push")
    assert set(names(tmp_path)) == others


def test_what_was_left_to_go_on_with_stays(tmp_path):
    with another_process(tmp_path / ".push"):
        pass
    with StagingFolder(tmp_path / ".push", keep=True) as staging:
        assert (staging.path / "file").read_text() == "being uploaded"


def test_a_folder_that_was_released_is_not_released_again(tmp_path):
    first = StagingFolder(tmp_path / ".push")
    first.remove()
    with StagingFolder(tmp_path / ".push"):
        first.release()
        assert StagingFolder(tmp_path / ".push").path.name == ".push-2"


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
