import numpy as np
import pytest
import torch

from consistency_lens.data.row_order import (
    LengthGroups,
    MatesSampler,
    TogetherSampler,
    WithMates,
    num_pairs,
    pair_parts,
)

# the rows of each document
COUNTS = {
    "single rows": [1] * 7,
    "equal": [3] * 8,
    "mixed": [8, 4, 7, 1, 8, 2, 5, 5],
    "one large": [20, 3, 4, 1],
    "two": [6, 6],
}


def documents_of(name):
    documents = np.repeat(100 + np.arange(len(COUNTS[name])), COUNTS[name])
    return np.random.default_rng(0).permutation(documents)


def test_rows_of_a_document_follow_each_other():
    documents = np.repeat(np.arange(6), [8, 4, 7, 1, 8, 2])
    sampler = TogetherSampler(documents, together=4, seed=0)
    order = np.array(list(sampler))
    assert len(sampler) == 30 and sorted(order.tolist()) == list(range(30))
    changes = np.count_nonzero(np.diff(documents[order]))
    assert changes <= 9  # 2 + 1 + 2 + 1 + 2 + 1 groups
    assert list(TogetherSampler(documents, together=4, seed=0)) == order.tolist()
    sampler.set_epoch(1)
    assert list(sampler) != order.tolist()
    assert np.count_nonzero(np.diff(documents[list(TogetherSampler(documents, 1, seed=0))])) > 15


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("name", COUNTS)
def test_neighbours_are_of_two_documents_in_every_epoch(name, together):
    documents = documents_of(name)
    sampler = MatesSampler(documents, together, seed=3)
    seen = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler) and len(order) == len(sampler) and len(set(order)) == len(order)
        pairs = documents[np.array(order).reshape(-1, 2)]
        assert (pairs[:, 0] != pairs[:, 1]).all()
        seen.append(tuple(order))
    assert len(set(seen)) > 1


def test_single_rows_are_left_out_only_where_no_partner_is_left_and_not_always_the_same():
    lengths = {name: len(MatesSampler(documents_of(name), 1, seed=0)) for name in COUNTS}
    assert lengths == {"single rows": 6, "equal": 24, "mixed": 40, "one large": 16, "two": 12}
    sampler, seen = MatesSampler(documents_of("single rows"), 1, seed=0), set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        seen |= set(range(7)) - set(sampler)
    assert len(seen) > 4


def test_rows_of_a_pair_of_documents_stay_together():
    documents = np.repeat(np.arange(40), 8)
    order = np.array(list(MatesSampler(documents, together=8, seed=0)))
    assert sorted(order.tolist()) == list(range(320))
    for part in documents[order].reshape(-1, 8, 2):
        assert [len(set(side)) for side in part.T.tolist()] == [1, 1]


def test_as_many_parts_are_paired_as_can_be():
    generator = np.random.default_rng(0)
    for _ in range(200):
        documents = np.repeat(np.arange(5), generator.integers(0, 6, 5))
        if len(documents) == 0:
            continue
        pairs = pair_parts(generator.permutation(documents), generator)
        counts = np.unique(documents, return_counts=True)[1]
        # what is left over is of one document, or one part alone
        assert len(pairs) == num_pairs(counts)
        assert len(documents) - 2 * len(pairs) == max(2 * counts.max() - len(documents), len(documents) % 2)


def test_one_document_has_no_pairs():
    with pytest.raises(ValueError, match="the 5 rows have none to pair"):
        MatesSampler(np.zeros(5), 1, seed=0)


def test_a_row_and_its_neighbour_are_mates():
    collate = WithMates(lambda rows: {"rows": torch.tensor(rows)})
    assert collate([7, 3, 9, 4])["mates"].tolist() == [1, 0, 3, 2]
    with pytest.raises(ValueError, match="a batch has 3 rows"):
        collate([7, 3, 9])


@pytest.mark.parametrize("sampler_class", [TogetherSampler, MatesSampler])
def test_rows_of_similar_length_meet_in_a_step(sampler_class):
    generator = np.random.default_rng(0)
    documents, lengths = np.repeat(np.arange(300), 2), generator.integers(5, 100, 600)

    def padding(groups):
        sampler = sampler_class(documents, 1, seed=0, groups=groups)
        orders = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(600))
        steps = lengths[np.array(orders[0][:592]).reshape(-1, 16)]
        # the steps of a window are not in the order of their lengths
        assert np.count_nonzero(np.diff(steps.mean(1)) > 0) < 30
        pairs = documents[np.array(orders[0]).reshape(-1, 2)]
        assert sampler_class is TogetherSampler or (pairs[:, 0] != pairs[:, 1]).all()
        return steps.max(1).sum() * 16 / steps.sum()

    random, similar = padding(None), padding(LengthGroups(lengths, rows_per_step=16, window=20))
    # a pair is as long as the longer of the two
    assert random > 1.7 and similar < (1.15 if sampler_class is TogetherSampler else 1.5)
