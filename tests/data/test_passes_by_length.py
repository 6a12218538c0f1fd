import itertools

import numpy as np
import pytest
import torch
from flop_count import flops
from read_rows import LAYER, LENGTH, assert_same, collated, judged, rows_of, subject_of
from tiny_models import tiny_model

from consistency_lens.cached_passes import PASS_COST, PASS_COST_ON_CPU, cost_on
from consistency_lens.data.on_the_fly import read_activations
from consistency_lens.data.passes_by_length import (
    PassesByLength,
    cheapest_passes,
    read_by_length,
)
from consistency_lens.data.shared_contexts import ReadPlaces, share_contexts
from consistency_lens.subject import Subject, in_passes

# of some documents, two rows; no length twice but one
POSITIONS = ((4, 9), (19,), (3,), (12, 18), (6,), (9,))


@pytest.fixture(scope="module", params=[("llama", True), ("llama", False), ("gemma3", True), ("gemma3", False)])
def subject(request):
    family, context_attention = request.param
    return subject_of(family, context_attention=context_attention)


def cost_of(passes, pass_cost):
    return sum(count * length + pass_cost for count, length in passes)


@pytest.mark.parametrize("pass_cost", [0, 5, 30, 10_000])
def test_no_other_division_is_cheaper(pass_cost):
    lengths = np.array([40, 39, 30, 30, 12, 12, 11, 3])
    divisions = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut)]
        sizes = np.diff([*starts, len(lengths)])
        divisions.append([(size, lengths[start]) for start, size in zip(starts, sizes, strict=True)])
    passes = cheapest_passes(lengths, pass_cost)
    assert cost_of(passes, pass_cost) == min(cost_of(division, pass_cost) for division in divisions)
    assert sum(count for count, _ in passes) == len(lengths)
    if pass_cost == 0:
        assert cost_of(passes, 0) == lengths.sum()
    if pass_cost == 10_000:
        assert passes == ((len(lengths), 40),)


@pytest.mark.parametrize("share", [False, True])
def test_every_row_finds_its_context_in_a_pass_that_is_long_enough(share):
    plain = collated(rows_of(*POSITIONS))
    batch = PassesByLength(lambda rows: share_contexts(plain) if share else plain, pass_cost=3)([])
    lengths = batch["attention_mask"].sum(1)
    assert (lengths.diff() <= 0).all() and len(lengths) == (6 if share else 8)
    assert 1 < len(batch["context_passes"]) < len(lengths)
    assert sum(count for count, _ in batch["context_passes"]) == len(lengths)
    parts = in_passes(batch["context_passes"], batch["input_ids"], batch["attention_mask"])
    assert sum(int(mask.sum()) for _, mask in parts) == lengths.sum()  # nothing but padding is cut off
    for row, position in enumerate(plain["positions"].tolist()):
        context, slot = batch["row_contexts"][row], batch["row_slots"][row]
        assert batch["read_positions"][context, slot] == position
        assert torch.equal(batch["input_ids"][context, : position + 1], plain["input_ids"][row, : position + 1])
        assert batch["attention_mask"][context, position] == 1
    for name in ("rows", "tail_ids", "positions"):
        assert batch[name] is plain[name]


def test_contexts_of_one_length_stay_as_they_are():
    plain = collated(rows_of((9,), (9,), (9,)))
    assert read_by_length(plain, 0) is plain
    assert ReadPlaces.of(plain).passes is None


def test_a_pass_costs_less_on_a_cpu():
    assert cost_on(torch.device("cpu")) == PASS_COST_ON_CPU < PASS_COST == cost_on(torch.device("cuda"))


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_losses_and_gradients_are_those_of_one_pass(subject, share, with_context):
    plain = collated(rows_of(*POSITIONS))
    batch = share_contexts(plain) if share else plain
    divided = read_by_length(batch, 0)
    assert len(divided["context_passes"]) >= 4
    assert_same(judged(subject, divided, with_context), judged(subject, batch, with_context))


@pytest.mark.parametrize("settings", [{"layer": 3}, {"layer": LAYER, "one_token": False}])
def test_where_no_pass_is_ended_early_it_is_the_same(settings):
    subject = Subject(tiny_model("llama", num_hidden_layers=4), **settings)
    plain = collated(rows_of(*POSITIONS))
    assert_same(judged(subject, read_by_length(plain, 0), True), judged(subject, plain, True))


def test_the_padding_is_not_paid_for():
    subject = Subject(tiny_model("llama"), LAYER)
    plain = collated(rows_of(*[(position,) for position in range(2, LENGTH)]))
    subject.check_one_token(2 * LENGTH)
    batches = {cost: read_by_length(plain, cost) for cost in (0, 10_000)}
    costs = {
        cost: flops(lambda batch=batch: read_activations(subject, batch, keep_context=True))
        for cost, batch in batches.items()
    }
    share = plain["attention_mask"].sum() / plain["attention_mask"].numel()
    assert costs[0] < (share + 0.15) * costs[10_000]
