from collections import Counter

import numpy as np
import pytest
import torch

from consistency_lens.tuned_lens.passes import PassCache, PassDataset, concatenated
from consistency_lens.tuned_lens.residual_batches import ResidualBatch
from consistency_lens.tuned_lens.streamed_kl import Teacher

LAYERS, POSITIONS, WIDTH = 2, 6, 3
BLOCKS = np.arange(10)[:, None] * np.ones(4, dtype=np.int32)


def made_up(row: int) -> ResidualBatch:
    """What a subject could give for a block: numbers that say of which block and position they are."""
    numbers = 100.0 * row + torch.arange(POSITIONS)
    hidden = numbers[:, None].expand(POSITIONS, WIDTH)
    return ResidualBatch(hidden.expand(LAYERS, -1, -1), Teacher(hidden, numbers, hidden, numbers))


@pytest.mark.parametrize("steps", [1, 3])
def test_every_block_has_every_part_once_and_pools_come_one_after_the_other(steps):
    dataset = PassDataset(BLOCKS, pool=4, steps=steps, seed=316, first=50)
    items = [dataset[index] for index in range(len(dataset))]
    assert Counter((item["row"], item["part"]) for item in items) == Counter(
        (row, part) for row in range(50, 60) for part in range(steps)
    )
    assert [item["pool"] for item in items] == [0] * 4 * steps + [1] * 4 * steps + [2] * 2 * steps
    # within a pool step by step: each step has all of its blocks, in one order
    for start in range(0, 4 * steps, 4):
        assert [item["row"] for item in items[start : start + 4]] == [item["row"] for item in items[:4]]
        assert {item["part"] for item in items[start : start + 4]} == {start // 4}
    for item in items:
        assert (item["input_ids"] == item["row"] - 50).all() and item["input_ids"].dtype == np.int64


def test_the_order_is_of_the_seed():
    one, same, other = ([PassDataset(BLOCKS, 4, 2, seed)[i]["row"] for i in range(20)] for seed in (1, 1, 2))
    assert one == same != other and one[:4] != sorted(one[:4])


def test_steps_of_a_pool_share_out_its_positions_and_each_block_is_read_once():
    cache, read = PassCache(), []

    def reader(rows):
        def reads(places):
            read.extend(rows[place] for place in places)
            return concatenated([made_up(rows[place]) for place in places])

        return reads

    found = []
    for part in range(4):  # six positions: two parts of two, two of one
        batch = cache.take((0, 0), [7, 2], [part, part], 4, reader([7, 2]))
        assert batch.hidden.shape == (LAYERS, 2 * len(range(part, POSITIONS, 4)), WIDTH)
        assert torch.equal(batch.hidden[1], batch.teacher.hidden)
        assert torch.equal(batch.teacher.lse, batch.hidden[0, :, 0])
        found += batch.teacher.lse.tolist()
    assert sorted(found) == [200 + i for i in range(POSITIONS)] + [700 + i for i in range(POSITIONS)]
    assert read == [7, 2]
    cache.take((0, 1), [3], [0], 4, reader([3]))
    cache.take((0, 0), [7], [0], 4, reader([7]))  # what another pool has is not kept
    assert read == [7, 2, 3, 7]
