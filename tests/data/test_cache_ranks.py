"""Several processes build one cache: it is always the same, to the byte."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from killed_builds import LAYERS, Killed, both_files, build_both, subject, uneven_subject

from consistency_lens.data.cache_folder import CacheFolder

__all__ = ["subject"]


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
