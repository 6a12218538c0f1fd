"""Killed builds: the finished cache is always the same, to the byte."""

import json
import os
import threading
from pathlib import Path

import pytest
from cache_builds import LAYER, build, corpus, files_of, shard_hashes
from killed_builds import LAYERS, Killed, both_files, build_both, subject

from consistency_lens import atomic_write
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_reading import ActivationReader
from consistency_lens.data.cache_folder import CacheFolder

__all__ = ["build", "corpus", "subject"]


class KillAt:
    """Wraps functions so that the n-th call of any is the last, and is done or not done."""

    def __init__(self, n, done):
        self.left, self.done = n, done

    def __call__(self, function):
        def wrapped(*arguments, **keywords):
            self.left -= 1
            if self.left == 0 and not self.done:
                raise Killed
            result = function(*arguments, **keywords)
            if self.left == 0:
                raise Killed
            return result

        return wrapped


def build_killed_at(n, done, folder, subject, monkeypatch):
    """Kills a build before or after its n-th rename or removal of a file; True if there was an n-th."""
    kill = KillAt(n, done)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_write.os, "replace", kill(os.replace))
        patch.setattr(Path, "unlink", kill(Path.unlink))
        try:
            build_both(folder, subject, rows_per_shard=36)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_build_killed_at_any_step_ends_as_one_that_was_not(subject, tmp_path, monkeypatch, done):
    build_both(tmp_path / "whole", subject, rows_per_shard=36)
    whole = both_files(tmp_path / "whole")
    n = 1
    while build_killed_at(n, done, tmp_path / str(n), subject, monkeypatch):
        for layer in LAYERS:
            folder = tmp_path / str(n) / str(layer)
            if not (folder / "provenance.json").is_file():
                with pytest.raises(ValueError, match="(an unfinished|no) cache at"):
                    ActivationCache.open(folder)
        build_both(tmp_path / str(n), subject, rows_per_shard=36)
        assert both_files(tmp_path / str(n)) == whole
        n += 1
    # of each layer: settings, settings with the norm, 2 shards, 2 records, provenance; and 4 removals
    assert n > 2 * (7 + 4)
    assert ActivationCache.open(tmp_path / "whole" / "0").provenance["norm_filter"]["dropped_rows"] > 0


def test_what_a_killed_build_finished_is_not_built_again(build, monkeypatch, tmp_path):
    whole = build("whole")
    write_shard, written = CacheFolder.write_shard, []

    def write_two_then_die(self, index, *arguments):
        if len(written) == 2:
            raise Killed
        written.append(self.path / f"shard-{index:05d}.arrow")
        write_shard(self, index, *arguments)

    monkeypatch.setattr(CacheFolder, "write_shard", write_two_then_die)
    with pytest.raises(Killed):
        build("killed")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="an unfinished cache"):
        ActivationCache.open(tmp_path / "killed")
    before = [file.stat().st_mtime_ns for file in written]
    resumed = build("killed")
    assert [file.stat().st_mtime_ns for file in written] == before
    assert len(shard_hashes(whole)) > 3
    assert files_of(resumed.path) == files_of(whole.path)


def test_the_norm_that_rows_are_dropped_by_is_measured_once(build, monkeypatch, tmp_path):
    monkeypatch.setattr(CacheFolder, "write_shard", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build("killed", max_norm=4.0)
    monkeypatch.undo()
    file = tmp_path / "killed" / "building.json"
    kept = json.loads(file.read_text())
    # as another device might have rounded it
    file.write_text(json.dumps(kept | {"median_norm": kept["median_norm"] * 1.001}))
    resumed = build("killed", max_norm=4.0)
    assert resumed.provenance["norm_filter"]["median_norm"] == kept["median_norm"] * 1.001


def test_a_shard_that_lost_its_end_is_written_again(build, monkeypatch, tmp_path):
    whole = build("whole")
    monkeypatch.setattr(CacheFolder, "finish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build("killed")
    monkeypatch.undo()
    shard = tmp_path / "killed" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert files_of(build("killed").path) == files_of(whole.path)


def test_provenance_is_written_last(build, monkeypatch, tmp_path):
    monkeypatch.setattr(CacheFolder, "finish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build()
    assert json.loads((tmp_path / "cache" / "building.json").read_text())["layer"] == LAYER
    assert not (tmp_path / "cache" / "provenance.json").exists()


def test_a_finished_cache_is_opened_and_not_built_again(build, monkeypatch, subject):
    first = build()
    monkeypatch.setattr(subject.model, "forward", None)
    assert shard_hashes(build()) == shard_hashes(first)


def test_a_shard_is_written_while_the_next_one_is_read(build, monkeypatch):
    read, write_shard = ActivationReader.read, CacheFolder.write_shard
    second_read, overlapped = threading.Event(), []

    def reading(self, *arguments):
        reading.calls += 1
        if reading.calls == 2:
            second_read.set()
        return read(self, *arguments)

    def writing(self, index, *arguments):
        if index == 0:
            overlapped.append(second_read.wait(timeout=30))
        write_shard(self, index, *arguments)

    reading.calls = 0
    monkeypatch.setattr(ActivationReader, "read", reading)
    monkeypatch.setattr(CacheFolder, "write_shard", writing)
    build()
    assert overlapped == [True]
