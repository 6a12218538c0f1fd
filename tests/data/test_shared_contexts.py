import numpy as np
import pytest
import torch
from read_rows import assert_same, collated, judged, rows_of, subject_of

from consistency_lens.data.shared_contexts import SharedContexts, cheapest_group, share_contexts


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def subject(request):
    return subject_of(request.param)


def test_every_row_finds_its_context_and_position():
    plain = collated(rows_of((4, 9, 15), (7,), (3, 19)))
    shared = share_contexts(plain)
    assert shared["input_ids"].shape[0] == 3 and shared["read_positions"].shape == (3, 3)
    for row, position in enumerate(plain["positions"].tolist()):
        context, slot = shared["row_contexts"][row], shared["row_slots"][row]
        assert shared["read_positions"][context, slot] == position
        assert torch.equal(shared["input_ids"][context, : position + 1], plain["input_ids"][row, : position + 1])
        assert shared["attention_mask"][context, position] == 1
    pairs = set(zip(shared["row_contexts"].tolist(), shared["row_slots"].tolist(), strict=True))
    assert len(pairs) == 6  # no two rows at one place
    for name in ("rows", "tail_ids", "positions"):
        assert shared[name] is plain[name]


def test_rows_that_share_nothing_stay_as_they_are():
    plain = collated(rows_of((4,), (9,), (9,)))
    assert share_contexts(plain) is plain


def test_the_same_row_twice_has_two_places():
    rows = rows_of((5, 8))
    shared = share_contexts(collated(rows + rows))
    assert shared["input_ids"].shape[0] == 1 and sorted(shared["row_slots"].tolist()) == [0, 1, 2, 3]


def test_one_large_group_among_single_rows_is_read_in_parts():
    assert cheapest_group(np.array([8, 8, 8]), length=128) == 8
    size = cheapest_group(np.array([24] + [1] * 40), length=128)
    assert 1 < size < 24
    shared = share_contexts(collated(rows_of(range(2, 18), *[(19,)] * 40)))
    assert len(shared["input_ids"]) > 41
    assert torch.equal(shared["read_positions"][shared["row_contexts"], shared["row_slots"]], shared["positions"])


@pytest.mark.parametrize("with_context", [False, True])
def test_losses_and_gradients_are_those_of_rows_read_alone(subject, with_context):
    rows = rows_of((4, 9, 15), (7,), (3, 19))
    alone, shared = (judged(subject, collate(rows), with_context) for collate in (collated, SharedContexts(collated)))
    assert_same(shared, alone)
