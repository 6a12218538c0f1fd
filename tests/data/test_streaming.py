import threading
import time

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from published_rows import Published, numbered_table
from torch.utils.data import BatchSampler, DataLoader

from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.streaming import StreamedActivations, StreamSampler, patiently
from consistency_lens.hub_connection import HubError

WIDTH = 3
SHARDS = (9, 11, 0, 8, 12, 10, 7)
TOTAL = sum(SHARDS)


def publish(shards=SHARDS, documents=lambda row: row // 4):
    """Rows that hold their own number."""
    starts = np.cumsum([0, *shards])
    tables = [
        numbered_table(range(first, end), WIDTH, documents) for first, end in zip(starts, starts[1:], strict=False)
    ]
    return Published(tables, {"mean": [1.0] * WIDTH, "rms": 2.0, "rows": sum(shards)})


@pytest.fixture
def published():
    return publish()


def numbers(files):
    return [int(file[-13:-8]) for file in files]


# Rows


def test_rows_are_those_that_were_published(published):
    stream = published.stream()
    assert len(stream) == TOTAL
    for index, row in enumerate(stream.__getitems__(list(range(TOTAL)))):
        assert row["row"] == index and row["document"] == index // 4
        assert row["activation"].tolist() == [index] * WIDTH
        assert row["input_ids"].tolist() == [index % 7] * (1 + index % 5)
        assert row["position"] == index % 5
    assert stream.mean.tolist() == [1.0] * WIDTH and stream.rms == 2.0


def test_a_data_loader_batches_them(published):
    loader = DataLoader(published.stream(pair_seed=0), batch_size=8, collate_fn=ActivationCollator(0, 2))
    activations = torch.cat([batch["activations"] for batch in loader])
    assert activations[:, 0].tolist() == list(range(TOTAL))


def test_a_shard_is_read_once_while_it_is_in_use(published):
    stream = published.stream()
    for index in range(20):
        stream[index]
    assert numbers(published.read) == [0, 1]


def test_no_more_shards_stay_in_memory_than_are_mixed_and_loaded_ahead(published):
    stream = published.stream(window=1)
    for index in range(TOTAL):
        stream[index]
    assert len(stream._shards) == 2


def test_the_other_activation_is_of_another_document(published):
    stream = published.stream(pair_seed=5)
    for row in stream.__getitems__(list(range(TOTAL))):
        assert int(row["other_activation"][0]) // 4 != row["document"]


def test_a_shard_of_one_document_is_paired_with_the_next():
    published = publish((4, 4, 4), documents=lambda row: int(row >= 8))
    for row in published.stream(pair_seed=0).__getitems__(list(range(12))):
        assert (row["other_activation"][0] >= 8) != (row["row"] >= 8)


def test_one_document_alone_cannot_be_paired():
    stream = publish((4, 4), documents=lambda row: 7).stream(pair_seed=0)
    with pytest.raises(ValueError, match="A' must come from another document"):
        stream[0]


def test_a_file_that_was_changed_is_refused(published):
    name = published.provenance["parquet"][1]["file"]
    published.files[name] = published.files[name].replace(b"words", b"sword", 1)
    stream = published.stream()
    assert stream[0]["row"] == 0
    with pytest.raises(ValueError, match=f"the sha256 of '{name}' is not"):
        stream[SHARDS[0]]


def test_what_failed_once_is_tried_anew(published):
    broken = iter([True])

    def read_file(name):
        if next(broken, False):
            raise OSError("no network")
        return published.read_file(name)

    stream = StreamedActivations(published.provenance, read_file, window=2)
    with pytest.raises(OSError, match="no network"):
        stream[0]
    assert stream[0]["row"] == 0


def test_a_cache_that_was_not_published_is_refused(published):
    with pytest.raises(ValueError, match="no parquet files; publish it"):
        StreamedActivations({"mean": []}, published.read_file)


def test_some_rows_are_taken_from_few_shards(published):
    stream = published.stream()
    taken = [row["row"] for row in stream.take(10, seed=3)]
    assert len(set(taken)) == 10 and taken == sorted(taken)
    assert len(set(published.read)) == 2  # a window
    assert [row["row"] for row in published.stream().take(10, seed=3)] == taken
    assert [row["row"] for row in published.stream().take(10, seed=4)] != taken
    assert len(published.stream(window=20).take(1000, seed=0)) == TOTAL


# Order


@pytest.mark.parametrize(("processes", "batch"), [(1, 4), (2, 3), (3, 4), (4, 2), (9, 2)])
def test_an_epoch_has_every_row_once(published, processes, batch):
    sampler = StreamSampler(published.stream(), seed=0, batch_size=batch, num_processes=processes)
    assert len(sampler) == TOTAL
    assert sorted(sampler) == list(range(TOTAL))


def test_the_order_follows_from_seed_and_epoch(published):
    def order(seed, epoch, process=0):
        sampler = StreamSampler(published.stream(), seed, 4, num_processes=2, process_index=process)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0) == order(0, 0, process=1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_rows_of_a_window_are_mixed_and_shards_come_in_random_order(published):
    order = list(StreamSampler(published.stream(), seed=1, batch_size=4))
    shard = np.repeat(np.arange(len(SHARDS)), SHARDS)[order]
    first_two = list(dict.fromkeys(shard[: len(shard)]))[:2]
    size = sum(SHARDS[number] for number in first_two)
    assert set(shard[:size]) == set(first_two)  # a window is used up before the next
    assert (np.diff(shard[:size]) != 0).sum() > size / 4  # and its rows are not shard after shard
    assert order != sorted(order)


def test_each_process_reads_shards_of_its_own(published):
    batch, processes = 3, 2
    orders = {}
    for process in range(processes):
        stream = published.stream()
        sampler = StreamSampler(stream, 0, batch, processes, process)
        order, windows = sampler.order()
        shards = [[shard for window in of for shard in window] for of in windows]
        orders[process] = order
        own = np.concatenate([stream.first_rows[s] + np.arange(SHARDS[s]) for s in shards[process]])
        even = min(sum(SHARDS[s] for s in of) for of in shards) // batch * batch * processes
        batches = order[:even].reshape(-1, processes, batch)
        assert np.isin(batches[:, process], own).all()
        assert even > 0.7 * TOTAL
    assert np.array_equal(orders[0], orders[1])


def test_shards_are_loaded_ahead_in_the_order_of_the_epoch(published):
    stream = published.stream()
    sampler = StreamSampler(stream, seed=0, batch_size=4)
    (windows,) = sampler.order()[1]
    stream[next(iter(sampler))]
    stream._loader.shutdown(wait=True)
    assert set(numbers(published.read)) == {*windows[0], *windows[1]}


def test_skipping_to_a_place_in_an_epoch_reads_nothing(published):
    iterator = iter(StreamSampler(published.stream(), seed=0, batch_size=4))
    for _ in range(40):
        next(iterator)
    assert published.read == []


@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_an_epoch_reads_every_file_once_and_drops_it_when_it_has_passed(published, window):
    stream = published.stream(window=window)
    most = 0
    for index in StreamSampler(stream, seed=0, batch_size=4):
        stream[index]
        most = max(most, len(stream._shards))
    assert sorted(numbers(published.read)) == [n for n, rows in enumerate(SHARDS) if rows]
    assert most <= 2 * window


def test_a_second_epoch_goes_on_where_the_first_ended(published):
    stream = published.stream()
    sampler = StreamSampler(stream, seed=0, batch_size=4)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(stream[index]["row"] for index in sampler) == list(range(TOTAL))


def test_a_stream_that_was_closed_loads_no_more_until_it_is_asked(published):
    gate, begun = threading.Event(), []

    def slowly(name):
        begun.append(name)
        gate.wait(10)
        return published.files[name]

    stream = StreamedActivations(published.provenance, slowly, window=3)
    sampler = StreamSampler(stream, seed=0, batch_size=4)
    first = next(iter(sampler))
    asking = threading.Thread(target=stream.__getitem__, args=(first,), daemon=True)
    asking.start()
    while len(begun) < 2:  # as many as are loaded at a time
        time.sleep(0.001)
    stream.close()
    assert not stream._shards
    gate.set()
    asking.join(5)
    assert len(begun) <= 3
    assert stream[first]["row"] == first


def test_rows_that_are_taken_do_not_hold_their_shards(published):
    for row in published.stream(pair_seed=0).take(10, seed=0):
        assert row["activation"].base is None and row["input_ids"].base is None


def test_rows_known_from_training_are_not_taken(published):
    published.provenance["seen_in_training"] = list(range(0, TOTAL, 2))
    taken = [row["row"] for row in published.stream(window=20).take(1000, seed=0)]
    assert taken == list(range(1, TOTAL, 2))


def test_the_hub_is_asked_again(published, monkeypatch):
    monkeypatch.setattr("consistency_lens.data.streaming.RETRY_SECONDS", (0, 0))
    failures = iter([HubError("busy"), HubError("busy")])

    def read_file(name):
        for error in failures:
            raise error
        return name.encode()

    assert patiently(read_file)("a") == b"a"
    failures = iter([HubError("busy")] * 3)
    with pytest.raises(HubError, match="busy"):
        patiently(read_file)("a")


@pytest.mark.parametrize("processes", [2, 3])
def test_what_accelerate_gives_a_process_comes_from_its_shards(published, processes):
    batch, seen = 3, []
    for process in range(processes):
        stream = published.stream()
        sampler = StreamSampler(stream, 0, batch, processes, process)
        mine = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, process)
        own = [shard for window in sampler.order()[1][process] for shard in window]
        rows = [row for rows in mine for row in rows]
        shards = np.searchsorted(stream.first_rows, rows, side="right") - 1
        assert np.isin(shards, own).mean() > 0.7
        seen += rows
    assert set(seen) == set(range(TOTAL))
