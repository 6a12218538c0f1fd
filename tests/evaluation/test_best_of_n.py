import pytest
import torch
from checked_rows import evaluated_rows
from tiny_lenses import PROMPTS, disturb, tiny_lens
from tiny_models import WIDTH

from consistency_lens.evaluation.best_of_n import best_of_n
from consistency_lens.evaluation.metrics import fve, kl_recovered, squared_error
from consistency_lens.losses import kl_divergence
from consistency_lens.straight_through import row_keys


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lens(request):
    return disturb(tiny_lens(request.param, **PROMPTS))


@pytest.fixture(scope="module")
def evaluated(lens):
    return evaluated_rows(lens)


@pytest.fixture(scope="module")
def result(evaluated):
    return best_of_n(evaluated, count=8, seed=3)


def sampled(evaluated, seed, draw):
    """Reconstructions (N, d) of one draw of every row."""
    lens, rows = evaluated.lens, evaluated.column("rows")
    return lens.encode(lens.decode(evaluated.column("activations"), keys=row_keys(seed, 0, rows, draw)).token_ids)


def kl_of(evaluated, reconstructions):
    """KL (N,) by full passes of the subject."""
    subject = evaluated.lens.subject
    values = []
    for rows, batch in evaluated:
        context = subject.context(batch["input_ids"], batch["attention_mask"], batch["positions"][:, None])
        after = subject.replaced_logits_full(context, reconstructions[rows, None])
        values.append(kl_divergence(context.logits, after)[:, 0])
    return torch.cat(values)


def test_one_text_is_plain_sampling(lens, evaluated, result):
    activations, reconstructions = evaluated.column("activations"), sampled(evaluated, seed=3, draw=0)
    with torch.no_grad():
        kl = kl_of(evaluated, reconstructions)
        kl_mean = kl_of(evaluated, lens.mean.expand_as(activations))
    assert result["1"]["fve"] == pytest.approx(float(fve(activations, reconstructions, lens.mean)), abs=1e-5)
    assert result["1"]["kl_recovered"] == pytest.approx(float(kl_recovered(kl, kl_mean)), abs=1e-4)


def test_keeps_the_nearest_of_the_first_draws(lens, evaluated, result):
    activations = evaluated.column("activations")
    draws = torch.stack([sampled(evaluated, seed=3, draw=draw) for draw in range(4)])
    nearest = torch.stack([squared_error(activations, draw) for draw in draws]).argmin(dim=0)
    assert len(nearest.unique()) > 1
    best = draws[nearest, torch.arange(len(nearest))]
    assert result["4"]["fve"] == pytest.approx(float(fve(activations, best, lens.mean)), abs=1e-5)


def test_fve_never_falls(result):
    values = [of_size["fve"] for of_size in result.values()]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_a_larger_count_only_adds_to_a_smaller_one(evaluated, result):
    smaller = best_of_n(evaluated, count=4, seed=3)
    for size, values in smaller.items():
        assert result[size]["fve"] == values["fve"]
        assert result[size]["kl_recovered"] == pytest.approx(values["kl_recovered"], abs=1e-5)


@pytest.mark.parametrize("count, sizes", [(1, ["1"]), (6, ["1", "2", "4", "6"]), (8, ["1", "2", "4", "8"])])
def test_sizes_are_powers_of_two_and_the_count(evaluated, count, sizes):
    assert list(best_of_n(evaluated, count)) == sizes


def test_does_not_depend_on_the_batch_size_and_follows_the_seed(lens, result):
    together, other = (best_of_n(evaluated_rows(lens, batch_size=10), count=8, seed=seed) for seed in (3, 4))
    for size, values in result.items():
        assert together[size] == pytest.approx(values, abs=1e-4)
    assert other["1"] != together["1"]


def test_leaves_the_random_state_alone(evaluated):
    state = torch.random.get_rng_state()
    best_of_n(evaluated, count=2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_draws_are_an_error(evaluated):
    with pytest.raises(ValueError, match="best_of_n: count must be at least 1, got 0"):
        best_of_n(evaluated, count=0)


def test_a_reconstruction_that_is_not_finite_is_an_error(evaluated, monkeypatch):
    broken = torch.full((4, WIDTH), float("nan"))
    monkeypatch.setattr(evaluated.lens, "encode", lambda ids: broken[: len(ids)])
    with pytest.raises(ValueError, match="reconstructions of the sampled texts hold NaN or infinity in 4 of 4"):
        best_of_n(evaluated, count=2)
