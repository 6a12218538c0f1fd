"""The folder of a cache that is built: whose it is, how far the build is, and what a full disk leaves in it."""

import errno
import json
import os
from pathlib import Path

import pytest
from cache_builds import LAYER, build, corpus, files_of, make_corpus
from killed_builds import Killed, subject, uneven_subject

from consistency_lens import atomic_write
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.cache_folder import CacheFolder, CacheWriteError, how_to_finish
from consistency_lens.data.cache_verification import find_caches, verify_cache

__all__ = ["build", "corpus", "subject"]


# Whose it is


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 5), ("dtype", "float16"), ("min_position", 6), ("max_norm", 8.0)]
)
def test_other_settings_in_the_same_folder_are_refused(build, name, value):
    build()
    with pytest.raises(ValueError, match=f"was built with .*{value}"):
        build(**{name: value})


def test_a_build_that_finished_no_shard_leaves_the_folder_free(build, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "building.json").write_text('{"weights_hash": "another", "median_norm": 3.0}')
    (tmp_path / "cache" / ".shard-00009.arrow.partial").touch()
    cache = build()
    assert files_of(cache.path) == files_of(build("other").path)


def test_another_corpus_or_subject_in_the_same_folder_is_refused(build):
    build()
    with pytest.raises(ValueError, match="was built with dataset_hash"):
        build(corpus=make_corpus(22))
    other = uneven_subject()
    other.model.model.norm.weight.data[0] = 2
    with pytest.raises(ValueError, match="was built with weights_hash"):
        build(subject=other)


def test_a_cache_from_before_the_newer_settings_is_opened(build):
    path = build().path / "provenance.json"
    provenance = json.loads(path.read_text())
    for name in ("max_norm", "dataset_split", "loaded_as"):
        del provenance[name]
    path.write_text(json.dumps(provenance))
    assert len(build()) == provenance["rows"]


def test_names_and_facts_do_not_make_another_cache(build, monkeypatch, subject):
    """The hashes say what was read; a folder may be spelled in several ways, and a corpus told of later."""
    first = build()
    monkeypatch.setattr(subject.model, "forward", None)
    again = build(
        subject_name="./tiny", dataset_name="/data/random", subject_revision="abc", dataset_revision="def",
        corpus_facts={"max_length": 20},
    )  # fmt: skip
    assert again.provenance == first.provenance and first.provenance["subject"] == "tiny"
    assert "corpus" not in first.provenance


def test_shards_of_unknown_origin_are_refused(build, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard-00000.arrow").touch()
    with pytest.raises(ValueError, match="has shards but no building.json"):
        build()


def test_two_builds_in_one_folder_at_a_time_are_refused(build, tmp_path):
    folder = CacheFolder(tmp_path / "cache", {"layer": LAYER})
    with folder.locked(), pytest.raises(ValueError, match="another build is at work in .*cache"):
        build()
    assert files_of(build().path).keys().isdisjoint({".building.lock"})


# How far it is


def killed_after(build, monkeypatch, shards, **changes):
    """Builds that many shards and dies."""
    write_shard = CacheFolder.write_shard

    def dying(self, index, *arguments):
        if index == shards:
            raise Killed
        write_shard(self, index, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CacheFolder, "write_shard", dying)
        build(**changes)


def test_an_unfinished_build_says_how_far_it_is_and_what_goes_on_with_it(build, monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    killed_after(build, monkeypatch, 3, arguments={"model": "tiny", "batch_size": 4}, max_norm=4.0)
    assert json.loads((folder / "arguments.json").read_text()) == {"model": "tiny", "batch_size": 4}
    finish = f"consistency-lens cache --config {folder / 'arguments.json'}"
    assert how_to_finish(folder) == f"3 of 4 shards are done; finish it with: {finish}"
    with pytest.raises(ValueError, match="an unfinished cache at .*cache': 3 of 4 shards are done"):
        find_caches(folder)
    (check,) = verify_cache(folder, progress=False)
    assert not check.passed and "3 of 4 shards are done" in check.detail
    # those of the first start stay
    build(arguments={"model": "tiny", "batch_size": 8}, max_norm=4.0)
    assert json.loads((folder / "arguments.json").read_text())["batch_size"] == 4


def test_a_build_without_arguments_is_run_again_and_a_pull_pulled_again(build, monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    killed_after(build, monkeypatch, 1)
    assert how_to_finish(folder) == "1 of 4 shards are done; run its build again to finish it"
    origin = {"repo": "user/tiny", "commit": "abc", "split": "train"}
    CacheFolder(tmp_path / "my cache", {"layer": LAYER, "pulled_from": origin}).claim(7)
    assert how_to_finish(tmp_path / "my cache") == (
        "0 of 7 shards are done; finish it with: consistency-lens pull --repo user/tiny --revision abc --split train "
        f"--path '{tmp_path / 'my cache'}'"
    )


def test_arguments_of_other_settings_do_not_stay(build, monkeypatch, tmp_path):
    killed_after(build, monkeypatch, 0, arguments={"seed": 1}, seed=1)
    killed_after(build, monkeypatch, 0, arguments={"seed": 2}, seed=2)
    assert json.loads((tmp_path / "cache" / "arguments.json").read_text()) == {"seed": 2}


# Full disk


def test_a_full_disk_is_named_and_the_next_run_goes_on(build, monkeypatch, tmp_path):
    whole = build("whole")
    fsync, calls = os.fsync, []

    def full_at_the_sixth(descriptor):
        calls.append(descriptor)
        if len(calls) >= 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(atomic_write.os, "fsync", full_at_the_sixth)
    with pytest.raises(
        CacheWriteError, match=r"cannot write to '.*cache': No space left on device; make room"
    ) as failed:
        build()
    assert "\n" not in str(failed.value)
    monkeypatch.undo()
    first = (tmp_path / "cache" / "shard-00000.arrow").stat().st_mtime_ns
    assert files_of(build().path) == files_of(whole.path)
    assert (tmp_path / "cache" / "shard-00000.arrow").stat().st_mtime_ns == first


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["building.json", "shard-00002.arrow", "shard-00001.json", "provenance.json"])
def test_no_file_is_taken_for_whole_that_the_device_had_no_room_for(build, tmp_path, name):
    whole = build("whole")
    (tmp_path / "cache").mkdir()
    partial = tmp_path / "cache" / f".{name}.partial"
    partial.symlink_to("/dev/full")
    with pytest.raises(CacheWriteError, match="No space left on device"):
        build()
    with pytest.raises(ValueError, match="(an unfinished|no) cache at"):
        ActivationCache.open(tmp_path / "cache")
    assert not partial.is_symlink()  # what was half-written takes no room
    assert files_of(build().path) == files_of(whole.path)


@pytest.mark.parametrize("name", ["building.json", "provenance.json"])
def test_a_damaged_file_is_named(build, tmp_path, name):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).write_text('{"layer": 1')
    with pytest.raises(ValueError, match=f"activation cache: .*{name}' is damaged .*; choose another folder"):
        build()


def test_a_folder_that_cannot_be_made_is_named(build, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheWriteError, match="cannot write to .*file/cache"):
        build("file/cache")
