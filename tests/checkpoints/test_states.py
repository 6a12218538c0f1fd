"""What a checkpoint keeps beside the model comes back as it was."""

import random

import numpy as np
import torch

from consistency_lens.checkpoints.states import load_random_states, save_random_states


def draw():
    """Numbers of every generator; a pair of normal ones is drawn at once, and the second kept for the next call."""
    return random.random(), random.gauss(), np.random.random(), np.random.standard_normal(), torch.rand(2).tolist()


def test_every_generator_goes_on_where_it_was(tmp_path):
    draw()
    save_random_states(tmp_path, 0)
    expected = draw()
    assert draw() != expected
    assert load_random_states(tmp_path, 0)
    assert draw() == expected


def test_a_process_that_saved_nothing_says_so(tmp_path):
    save_random_states(tmp_path, 0)
    assert not load_random_states(tmp_path, 1)
