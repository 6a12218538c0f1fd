"""What a cache will hold: its positions, and the rows of its shards."""

import numpy as np
import pytest
from cache_builds import MIN_POSITION, NUM_SEQUENCES, VOCAB, corpus

from consistency_lens.data import cache_plan
from consistency_lens.data.cache_plan import draw_positions

__all__ = ["corpus"]


def test_positions_are_uniform():
    drawn = [draw_positions(12, 5, index, 2, 4, seed=0) for index in range(3000)]
    shares = np.bincount(np.concatenate(drawn), minlength=11)[4:] / 6000
    np.testing.assert_allclose(shares, 1 / 7, atol=0.02)


def test_a_sequence_with_few_positions_gives_all_of_them():
    assert draw_positions(8, 5, 0, 10, 4, seed=0).tolist() == [4, 5, 6]


def plan_of(corpus, positions_per_sequence):
    return cache_plan.plan_cache(
        corpus, positions_per_sequence=positions_per_sequence, min_position=MIN_POSITION, rows_per_shard=18, seed=0,
        vocab_size=VOCAB, max_length=None,
    )  # fmt: skip


@pytest.mark.parametrize("positions_per_sequence", [3, 100])
def test_the_plan_counts_the_rows_of_each_shard(corpus, positions_per_sequence):
    plan = plan_of(corpus, positions_per_sequence)
    assert plan.shard_rows.tolist() == [plan.shard(index).num_rows for index in range(len(plan.shard_rows))]


def test_a_sample_of_the_sequences_has_the_positions_that_the_cache_has(corpus):
    plan = plan_of(corpus, 3)
    assert plan.sample(5).num_rows == 15 and len(plan.sample(1000).contexts) == NUM_SEQUENCES
