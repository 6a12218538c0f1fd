import copy

import pytest
import torch
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from consistency_lens.checkpoints import states
from consistency_lens.tuned_lens.optimizer import MuonWithAdamW, make_optimizer
from consistency_lens.tuned_lens.translator import TunedTranslator

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.3}  # no default of either


def translators() -> torch.nn.ModuleList:
    torch.manual_seed(0)
    return torch.nn.ModuleList(TunedTranslator(8, rank, temperature=True) for rank in (3, None))


def give_gradients(parameters: torch.nn.ModuleList, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def step(optimizer: torch.optim.Optimizer, parameters: torch.nn.ModuleList, seed: int) -> None:
    """One step on seeded gradients, which are cleared."""
    give_gradients(parameters, seed)
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters.parameters())


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_steps_equal_both_optimizers_run_apart():
    together, apart = translators(), translators()
    optimizer = MuonWithAdamW(together.parameters(), **SETTINGS)
    matrices = [p for p in apart.parameters() if p.ndim == 2]
    others = [p for p in apart.parameters() if p.ndim != 2]
    assert len(matrices) == 3 and len(others) == 4
    muon = Muon(matrices, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(others, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.3)
    start = copy.deepcopy(together)
    for seed in range(3):
        step(optimizer, together, seed)
        give_gradients(apart, seed)
        muon.step()
        adamw.step()
    assert_equal(together, apart)
    assert not any(torch.equal(a, b) for a, b in zip(together.parameters(), start.parameters(), strict=True))


def test_a_scheduler_reaches_both():
    parameters = translators()
    optimizer = MuonWithAdamW(parameters.parameters(), **SETTINGS)
    schedule = LambdaLR(optimizer, lambda number: 0.0 if number else 1.0)
    step(optimizer, parameters, 0)
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.0, 0.0]
    before = copy.deepcopy(parameters)
    step(optimizer, parameters, 1)
    assert_equal(parameters, before)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_saved_and_read_it_goes_on_bit_for_bit(name, tmp_path):
    whole = translators()
    optimizer = make_optimizer(name, whole.parameters(), **SETTINGS)
    schedule = LambdaLR(optimizer, lambda number: 1 / (number + 1))
    for seed in range(2):
        step(optimizer, whole, seed)
        schedule.step()
    states.save_optimizer(optimizer.state_dict(), tmp_path)

    resumed = copy.deepcopy(whole)
    fresh = make_optimizer(name, resumed.parameters(), **SETTINGS)
    fresh_schedule = LambdaLR(fresh, lambda number: 1 / (number + 1))
    fresh.load_state_dict(states.read_optimizer(fresh, tmp_path))
    fresh_schedule.load_state_dict(schedule.state_dict())
    for seed in range(2, 5):
        for each, parameters, rates in ((optimizer, whole, schedule), (fresh, resumed, fresh_schedule)):
            step(each, parameters, seed)
            rates.step()
    assert_equal(whole, resumed)


def test_its_state_numbers_each_parameter_once():
    parameters = translators()
    optimizer = MuonWithAdamW(parameters.parameters(), **SETTINGS)
    step(optimizer, parameters, 0)
    state = optimizer.state_dict()
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(7)) == sorted(state["state"])


def test_a_closure_is_evaluated_once_before_the_step():
    parameters, seen = translators(), []

    def closure():
        seen.append(parameters[0].U.detach().clone())
        loss = sum(p.square().sum() for p in parameters.parameters())
        loss.backward()
        return loss

    with torch.no_grad():
        loss = MuonWithAdamW(parameters.parameters(), **SETTINGS).step(closure)
    assert len(seen) == 1 and loss > 0
    assert torch.equal(seen[0], translators()[0].U) and not torch.equal(seen[0], parameters[0].U)


def test_parameters_are_found_once_when_they_come_as_an_iterator():
    optimizer = make_optimizer("muon", iter(translators().parameters()), **SETTINGS)
    assert isinstance(optimizer, MuonWithAdamW)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 7
    assert isinstance(make_optimizer("adamw", translators().parameters(), **SETTINGS), AdamW)
