"""Activations of a shard's sequences, read in batches of like length."""

import numpy as np
import torch
from at_once import at_once
from tiny_models import random_tokens, tiny_model

from consistency_lens.data.activation_reading import ActivationReader, length_buckets
from consistency_lens.data.cache_plan import ShardPlan
from consistency_lens.subject import Subject

PLAN = ShardPlan([np.arange(3, 12), np.arange(20, 25)], [np.array([2, 8]), np.array([4])], np.array([0, 1]))


def test_rows_are_read_while_another_thread_uses_the_subject():
    subject, positions = Subject(tiny_model("llama"), layer=1), torch.tensor([[8, 3], [4, 1]])
    reader = ActivationReader(subject.stream, batch_size=2)

    def use() -> torch.Tensor:
        context = subject.context(*random_tokens(9, 5), positions)
        return subject.replaced_logits(context, context.activations.flip(0))

    rows, logits = reader.read(PLAN, [0, 2]), use()
    read, used = at_once(lambda: reader.read(PLAN, [0, 2]), use, times=5)
    for found in read:
        np.testing.assert_allclose(found, rows, rtol=1e-5, atol=1e-5)
    for found in used:
        torch.testing.assert_close(found, logits)


def test_buckets_hold_every_sequence_once_in_batches_of_no_more_tokens_than_the_first():
    lengths = np.random.default_rng(0).integers(5, 100, 200).tolist()
    buckets = length_buckets(lengths, 8)
    assert sorted(np.concatenate(buckets)) == list(range(200))
    assert len(buckets[0]) == 8
    padded = [len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets]
    assert max(padded) <= 8 * max(lengths)
    assert sum(padded) < 1.1 * sum(lengths)
