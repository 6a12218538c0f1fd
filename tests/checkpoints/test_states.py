"""What a checkpoint keeps beside the model comes back as it was."""

import random

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

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


def stepped(optimizer_class, steps):
    """Two parameters, large enough for 8 bits, and their optimizer after some steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 128)) for _ in range(2)]
    optimizer = optimizer_class(parameters, lr=1e-2)
    step(parameters, optimizer, range(steps))
    return parameters, optimizer


def step(parameters, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "AdamW8bit", "Lion8bit"])
def test_an_optimizer_goes_on_as_if_it_had_not_been_written(tmp_path, name):
    where = torch.optim if hasattr(torch.optim, name) else pytest.importorskip("bitsandbytes").optim
    whole, optimizer = stepped(getattr(where, name), 3)
    save_optimizer(optimizer.state_dict(), tmp_path)
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in whole]
    resumed = getattr(where, name)(again, lr=1e-2)
    resumed.load_state_dict(read_optimizer(resumed, tmp_path))
    step(whole, optimizer, [7, 8])
    step(again, resumed, [7, 8])
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_other_parameter_groups_are_refused(tmp_path):
    _, optimizer = stepped(torch.optim.AdamW, 1)
    save_optimizer(optimizer.state_dict(), tmp_path)
    fewer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(64, 128))])
    with pytest.raises(ValueError, match=r"parameter groups of sizes \[2\], the run has \[1\]; resume the same"):
        read_optimizer(fewer, tmp_path)
