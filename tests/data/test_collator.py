import numpy as np
import pytest
import torch

from consistency_lens.data.collator import ActivationCollator

BOS, EOS = 1, 2


def make_row(input_ids, row=0, **extra):
    return {
        "activation": np.full(3, row, dtype=np.float16),
        "input_ids": np.array(input_ids, dtype=np.int32),
        "position": np.int32(len(input_ids) - 1),
        "document": np.int64(2**62 + row),
        "row": np.int64(row),
    } | extra


@pytest.fixture
def collator():
    return ActivationCollator(pad_token_id=EOS, num_text_tokens=3, bos_token_id=BOS)


def test_contexts_are_padded_on_the_right_and_masked_by_length(collator):
    batch = collator([make_row([BOS, 5, EOS, 7, 8]), make_row([BOS, 5, EOS])])
    assert batch["input_ids"].tolist() == [[BOS, 5, EOS, 7, 8], [BOS, 5, EOS, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [4, 2]


def test_tail_is_the_end_of_the_context_with_the_current_token(collator):
    batch = collator([make_row([BOS, 5, 6, 7, 8])])
    assert batch["tail_ids"].tolist() == [[6, 7, 8]]
    assert batch["tail_mask"].all()


def test_tokens_behind_the_position_are_no_context(collator):
    batch = collator([make_row([BOS, 5, 6, 7, 8], position=np.int32(2))])
    assert batch["input_ids"].tolist() == [[BOS, 5, 6]] and batch["positions"].tolist() == [2]
    assert batch["tail_ids"].tolist() == [[EOS, 5, 6]]


def test_short_tails_are_padded_on_the_left_and_leave_bos_out(collator):
    batch = collator([make_row([BOS, 5, 6]), make_row([BOS])])
    assert batch["tail_ids"].tolist() == [[EOS, 5, 6], [EOS, EOS, EOS]]
    assert batch["tail_mask"].tolist() == [[False, True, True], [False, False, False]]


def test_without_a_bos_the_first_token_is_text():
    batch = ActivationCollator(pad_token_id=0, num_text_tokens=3)([make_row([BOS, 5])])
    assert batch["tail_ids"].tolist() == [[0, BOS, 5]]


def test_activations_become_float32_and_indices_int64(collator):
    batch = collator([make_row([BOS, 5], row=4), make_row([BOS, 6], row=9)])
    assert batch["activations"].dtype == torch.float32
    assert batch["activations"].tolist() == [[4.0] * 3, [9.0] * 3]
    assert batch["rows"].tolist() == [4, 9]
    assert batch["document"].tolist() == [2**62 + 4, 2**62 + 9]
    assert {batch[name].dtype for name in ("positions", "rows", "document", "input_ids", "tail_ids")} == {torch.int64}


def test_other_activations_are_collated_where_rows_have_them(collator):
    assert "other_activations" not in collator([make_row([BOS, 5])])
    batch = collator([make_row([BOS, 5], other_activation=np.array([1, 2, 3], dtype=np.float16))])
    assert batch["other_activations"].tolist() == [[1.0, 2.0, 3.0]]


def test_a_text_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="num_text_tokens must be at least 1, got 0"):
        ActivationCollator(pad_token_id=0, num_text_tokens=0)


def test_a_missing_pad_token_is_refused():
    with pytest.raises(ValueError, match="pad_token_id must be a token id, got None"):
        ActivationCollator(pad_token_id=None, num_text_tokens=4)
