import torch

from consistency_lens.training.tails import Tails


def test_a_tail_begins_at_index_0_whatever_its_length():
    batch = {
        "tail_ids": torch.tensor([[0, 0, 5], [7, 8, 9]]),
        "tail_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]).bool(),
    }
    limits = torch.tensor([3, 2])
    tails = Tails.of(batch, limits, stop_token_id=None)
    assert tails.ids[0, 0] == 5 and tails.ids[1].tolist() == [7, 8, 9]
    assert tails.mask.tolist() == [[True, False, False], [True] * 3]
    assert tails.read_mask.tolist() == [[True, False, False], [False, True, True]]
    stopped = Tails.of(batch, limits, stop_token_id=2)
    assert stopped.ids[0, :2].tolist() == [5, 2] and stopped.ids[1].tolist() == [8, 9, 2]
    assert stopped.mask.tolist() == [[True, True, False], [True] * 3]
    assert stopped.read_mask.tolist() == [[True, False, False], [True, True, False]]
