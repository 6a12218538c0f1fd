"""States of optimizers on disk."""

import pytest
import torch

from consistency_lens.checkpoints.states import read_optimizer, save_optimizer


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
