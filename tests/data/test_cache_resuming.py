"""Killed builds, full disks and ranks: the finished cache is always the same, to the byte."""

import errno
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cache_builds import (
    ARGUMENTS,
    LAYER,
    files_of,
    make_corpus,
    make_subject,
    make_tokenizer,
    shard_hashes,
)

from consistency_lens import atomic_write
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_reading import ActivationReader
from consistency_lens.data.cache_building import build_activation_cache, build_activation_caches
from consistency_lens.data.cache_folder import CacheFolder, CacheWriteError, how_to_finish
from consistency_lens.data.cache_verification import find_caches, verify_cache

LAYERS = (0, 2)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def uneven_subject():
    """A subject in which three tokens have massive activations, so that the norm filter has something to drop."""
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data[7:10] *= 1e4
    return subject


@pytest.fixture(scope="module")
def subject():
    return uneven_subject()


@pytest.fixture
def build(subject, tmp_path):
    def build(path="cache", **changes):
        arguments = {"subject": subject, "corpus": make_corpus(), "tokenizer": make_tokenizer(), **ARGUMENTS} | changes
        return build_activation_cache(path=tmp_path / path, **arguments)

    return build


def build_both(folder, subject, **changes):
    """Two layers, with a norm filter: all that a build can do."""
    arguments = {"corpus": make_corpus(), "tokenizer": make_tokenizer(), **ARGUMENTS, "max_norm": 4.0} | changes
    return build_activation_caches(subject.stream, paths={k: folder / str(k) for k in LAYERS}, **arguments)


def both_files(folder):
    return {layer: files_of(folder / str(layer)) for layer in LAYERS}


# Kills


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


# Started again


def test_a_finished_cache_is_opened_and_not_built_again(build, monkeypatch, subject):
    first = build()
    monkeypatch.setattr(subject.model, "forward", None)
    assert shard_hashes(build()) == shard_hashes(first)


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
    partial.unlink()
    assert files_of(build().path) == files_of(whole.path)


def test_a_folder_that_cannot_be_made_is_named(build, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheWriteError, match="cannot write to .*file/cache"):
        build("file/cache")


# Ranks


class Rank:
    """One of several threads that build together, as `accelerate.PartialState` would see it."""

    def __init__(self, process_index, barrier, last_wait=None):
        self.process_index = process_index
        self.num_processes = barrier.parties
        self.barrier = barrier
        self.waits, self.last_wait = 0, last_wait

    def wait_for_everyone(self):
        self.waits += 1
        if self.waits == self.last_wait:
            raise Killed
        self.barrier.wait(timeout=60)


def build_with_ranks(folder, num_ranks, **changes):
    barrier = threading.Barrier(num_ranks)
    subjects = [uneven_subject() for _ in range(num_ranks)]

    def build(rank):
        try:
            return build_both(folder, subjects[rank], state=Rank(rank, barrier), **changes)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(build, range(num_ranks)))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_any_number_of_ranks_writes_the_same_cache(subject, tmp_path, num_ranks):
    build_both(tmp_path / "alone", subject)
    for caches in build_with_ranks(tmp_path / "ranks", num_ranks):
        assert caches.keys() == set(LAYERS)
    assert both_files(tmp_path / "ranks") == both_files(tmp_path / "alone")


def test_the_first_rank_alone_shows_how_far_it_is(tmp_path, capsys):
    build_with_ranks(tmp_path / "ranks", 2, progress=True)
    shown = capsys.readouterr().err
    assert "rank 1 of 2: 100%" in shown and "36/36" in shown and "rows/s" in shown and "tokens/s" in shown
    assert "/72" not in shown and "rank 2" not in shown


def test_each_rank_writes_its_own_shards(tmp_path, monkeypatch):
    write_shard, written = CacheFolder.write_shard, []
    monkeypatch.setattr(
        CacheFolder,
        "write_shard",
        lambda self, index, *rest: written.append((self.layer, index)) or write_shard(self, index, *rest),
    )
    build_with_ranks(tmp_path / "ranks", 2)
    assert sorted(written) == [(layer, index) for layer in LAYERS for index in range(4)]


def test_ranks_that_would_build_something_else_are_refused(subject, tmp_path):
    other = uneven_subject()
    other.model.model.norm.weight.data[0] = 2
    barrier = threading.Barrier(2)
    folder = tmp_path / "ranks"

    def build(rank):
        try:
            build_both(folder, [subject, other][rank], state=Rank(rank, barrier))
        except Exception as error:
            barrier.abort()
            return error

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert isinstance(first, threading.BrokenBarrierError)
    assert isinstance(second, ValueError)
    assert re.search("weights_hash '.{64}', .* '.{64}'", str(second)) and "\n" not in str(second)
    for layer in LAYERS:
        assert not (folder / str(layer) / "provenance.json").exists()
    build_both(folder, subject)
    build_both(tmp_path / "alone", subject)
    assert both_files(folder) == both_files(tmp_path / "alone")


def test_another_number_of_ranks_goes_on_where_one_was_killed(subject, tmp_path):
    build_both(tmp_path / "alone", subject)
    first = Rank(0, threading.Barrier(1), last_wait=2)
    first.num_processes = 2
    with pytest.raises(Killed):
        build_both(tmp_path / "ranks", subject, state=first)
    shards = sorted(file.name for file in (tmp_path / "ranks" / "0").glob("*.arrow"))
    assert shards == ["shard-00000.arrow", "shard-00002.arrow"]
    build_with_ranks(tmp_path / "ranks", 3)
    assert both_files(tmp_path / "ranks") == both_files(tmp_path / "alone")
