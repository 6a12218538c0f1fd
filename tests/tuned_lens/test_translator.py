import pytest
import torch

from consistency_lens.tuned_lens.translator import TunedTranslator

WIDTH, RANK = 12, 4


def translator(rank: int | None = RANK, temperature: bool = True, seed: int = 0) -> TunedTranslator:
    """One whose every tensor is away from its default."""
    torch.manual_seed(seed)
    made = TunedTranslator(WIDTH, rank, temperature)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def matrix(of: TunedTranslator) -> torch.Tensor:
    return of.W if of.U is None else of.U @ of.V.T


@pytest.mark.parametrize("rank", [RANK, None])
def test_forward_by_hand(rank):
    one, hidden = translator(rank), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(one(hidden), hidden + hidden @ matrix(one) + one.c)


@pytest.mark.parametrize("rank", [RANK, None])
def test_distance_is_that_of_the_maps(rank):
    one, other = translator(rank), translator(rank, seed=1)
    distance = one.distance(other)
    torch.testing.assert_close(distance, torch.linalg.matrix_norm(matrix(one) - matrix(other)).square())
    distance.backward()
    assert other.c.grad is None and all(p.grad is None for p in other.parameters())
    moved = [p for p in (one.U, one.V, one.W) if p is not None]
    assert all(p.grad.abs().min() > 0 for p in moved)


def test_one_map_said_in_two_ways_is_at_no_distance():
    one, other = translator(), translator(seed=1)
    rotation = torch.linalg.qr(torch.randn(RANK, RANK)).Q
    with torch.no_grad():
        other.U.copy_(one.U @ rotation * 2)
        other.V.copy_(one.V @ rotation / 2)
    assert one.distance(other).abs() < 1e-3
    assert (one.U - other.U).square().sum() > 1


@pytest.mark.parametrize("rank", [RANK, None])
def test_smallness_is_the_sum_of_squares_without_the_temperature(rank):
    one = translator(rank)
    expected = sum(p.square().sum() for name, p in one.named_parameters() if name != "log_tau")
    torch.testing.assert_close(one.smallness(), expected)


@pytest.mark.parametrize("value", [0.1, 0.5, 1.0, 10.0])
def test_a_temperature_that_is_set_is_there(value):
    one = translator()
    one.set_temperature(torch.tensor(value))
    assert one.tau.item() == pytest.approx(value, rel=1e-4)


def test_temperatures_stay_above_zero():
    one = translator()
    one.set_temperature(torch.tensor(0.0))
    with torch.no_grad():
        assert one.tau > 0
        one.log_tau.fill_(-1e4)
        assert one.tau > 0


def test_without_a_temperature_it_is_one_and_stays_so():
    one = translator(temperature=False)
    one.set_temperature(torch.tensor(2.0))
    assert one.tau == 1 and "log_tau" not in dict(one.named_parameters())


@pytest.mark.parametrize("rank", [RANK, None])
def test_a_new_one_is_close_to_the_identity_and_has_gradients(rank):
    torch.manual_seed(0)
    one, hidden = TunedTranslator(WIDTH, rank, temperature=True), torch.randn(5, WIDTH)
    translated = one(hidden)
    assert (translated - hidden).norm() < 0.02 * hidden.norm()
    (translated * torch.randn(5, WIDTH) / one.tau).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in one.parameters())
