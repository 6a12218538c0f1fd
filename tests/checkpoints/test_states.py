"""What a checkpoint keeps beside the model comes back as it was."""

import random

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Adafactor

from consistency_lens.checkpoints.states import (
    load_random_states,
    load_scheduler,
    read_optimizer,
    save_optimizer,
    save_random_states,
    save_scheduler,
)


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


@pytest.mark.parametrize("figures", [[], [2.0, 3.0]])  # before there is any figure, the best one is infinite
def test_a_scheduler_that_watches_figures_goes_on_where_it_was(tmp_path, figures):
    def scheduler():
        return ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=1.0), patience=0)

    saved, loaded = scheduler(), scheduler()
    for figure in figures:
        saved.step(figure)
    save_scheduler(saved, tmp_path)
    load_scheduler(loaded, tmp_path)
    assert loaded.state_dict() == saved.state_dict()


def test_an_optimizer_whose_state_is_not_of_tensors_alone_goes_on_where_it_was(tmp_path):
    def step(parameter, optimizer):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    one, other = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    saved, loaded = Adafactor([one]), Adafactor([other])
    step(one, saved)
    assert isinstance(saved.state_dict()["state"][0]["step"], int)
    save_optimizer(saved.state_dict(), tmp_path)
    other.data.copy_(one.data)
    loaded.load_state_dict(read_optimizer(loaded, tmp_path))
    step(one, saved)
    step(other, loaded)
    assert torch.equal(one, other) and saved.state_dict()["state"][0]["step"] == 2
