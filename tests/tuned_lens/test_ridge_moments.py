import pytest
import torch

from consistency_lens.tuned_lens.moments import RidgeMoments, cut_to_rank, pooled

ROWS, WIDTH, RANK = 400, 12, 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, d) correlated and off centre, y an affine map of it with noise; float32."""
    mixing = torch.eye(WIDTH) + 0.2 * normal(WIDTH, WIDTH, seed=1)
    x = normal(ROWS, WIDTH, seed=seed) @ mixing + 2 * normal(WIDTH, seed=2)
    y = x @ normal(WIDTH, WIDTH, seed=3) + normal(WIDTH, seed=4) + 0.3 * normal(ROWS, WIDTH, seed=5)
    return x.float(), y.float()


def moments_of(x: torch.Tensor, y: torch.Tensor, pieces: int = 1) -> RidgeMoments:
    moments = RidgeMoments(WIDTH)
    for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        moments.update(*part)
    return moments


def symmetric(seed: int, rank: int = WIDTH) -> torch.Tensor:
    factor = normal(WIDTH, rank, seed=seed)
    return factor @ factor.T


def loss(W, approximation, covariance, metric) -> float:
    """E|x (W - U V^T)|^2 in the metric."""
    error = W - approximation
    return torch.trace(error.T @ covariance @ error @ metric).item()


def test_without_penalty_it_is_least_squares():
    x, y = related()
    found = moments_of(x, y).solve(ridge=0)
    ones = torch.ones(ROWS, 1, dtype=torch.float64)
    direct = torch.linalg.lstsq(torch.cat([x.double(), ones], dim=1), y.double()).solution
    torch.testing.assert_close(torch.eye(WIDTH).double() + found.W, direct[:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.c, direct[-1], rtol=1e-4, atol=1e-4)


def test_with_penalty_it_is_least_squares_of_the_difference_with_rows_for_the_penalty():
    x, y = related()
    ridge = 0.3
    found = moments_of(x, y).solve(ridge)
    centred, target = (part.double() - part.double().mean(dim=0) for part in (x, y - x))
    penalty = (ROWS * ridge * centred.var(dim=0, correction=0).mean()).sqrt() * torch.eye(WIDTH).double()
    W = torch.linalg.lstsq(torch.cat([centred, penalty]), torch.cat([target, torch.zeros_like(penalty)])).solution
    torch.testing.assert_close(found.W, W, rtol=1e-4, atol=1e-5)
    mean_x, mean_y = x.double().mean(dim=0), y.double().mean(dim=0)
    torch.testing.assert_close(mean_x + mean_x @ found.W + found.c, mean_y, rtol=1e-5, atol=1e-5)


def test_a_huge_penalty_leaves_the_identity_and_a_shift():
    x, y = related()
    found = moments_of(x, y).solve(ridge=1e9)
    assert found.W.abs().max() < 1e-6
    torch.testing.assert_close(found.c, (y - x).double().mean(dim=0), rtol=1e-4, atol=1e-4)


def test_in_pieces_they_are_those_in_one():
    x, y = related()
    one, several = moments_of(x, y), moments_of(x, y, pieces=7)
    assert one.count == several.count == ROWS
    for name in ("mean_x", "mean_y", "covariance", "cross_covariance"):
        torch.testing.assert_close(getattr(several, name), getattr(one, name), rtol=1e-6, atol=1e-5)


def test_moments_are_those_of_the_rows():
    x, y = related()
    moments = moments_of(x, y, pieces=3)
    both = torch.cov(torch.cat([x, y], dim=1).double().T, correction=0)
    torch.testing.assert_close(moments.covariance, both[:WIDTH, :WIDTH], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross_covariance, both[:WIDTH, WIDTH:], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.mean_y, y.double().mean(dim=0))


def test_large_means_do_not_drown_the_covariance():
    x, y = (part.double() for part in related())
    far = 1000 * normal(WIDTH, seed=8)
    x, y = (x + far).float(), (y + far).float()
    moments = moments_of(x, y, pieces=7)
    both = torch.cov(torch.cat([x, y], dim=1).double().T, correction=0)
    torch.testing.assert_close(moments.covariance, both[:WIDTH, :WIDTH], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross_covariance, both[:WIDTH, WIDTH:], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.mean_x, x.double().mean(dim=0))
    pooled_mean, pooled_covariance = pooled({0: moments, 1: moments})
    torch.testing.assert_close(pooled_mean, moments.mean_x)
    torch.testing.assert_close(pooled_covariance, moments.covariance)


def test_a_state_goes_on_where_it_was_left():
    x, y = related()
    whole, first, second = moments_of(x, y, pieces=2), moments_of(x[:200], y[:200]), RidgeMoments(WIDTH)
    second.load_state(first.state())
    second.update(x[200:], y[200:])
    for found, expected in zip(second.solve(0.1), whole.solve(0.1), strict=True):
        assert torch.equal(found, expected)
    assert first.count == 200  # a state that was taken is a copy


def test_pooled_is_over_the_rows_of_all_layers():
    (a, y), (b, _) = related(seed=0), related(seed=7)
    mean, covariance = pooled({0: moments_of(a, y), 3: moments_of(b[:50], y[:50])})
    rows = torch.cat([a, b[:50]]).double()
    torch.testing.assert_close(mean, rows.mean(dim=0))
    torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_cut_is_the_best_of_its_rank(weighted):
    W, covariance = normal(WIDTH, WIDTH), symmetric(1) + torch.eye(WIDTH)
    metric = symmetric(2) + torch.eye(WIDTH) if weighted else torch.eye(WIDTH).double()
    U, V = cut_to_rank(W, RANK, covariance, metric if weighted else None)
    assert U.shape == V.shape == (WIDTH, RANK)
    best = loss(W, U @ V.T, covariance, metric)
    # what is left of singular values, with another factor of both matrices than the symmetric root
    values = torch.linalg.svdvals(torch.linalg.cholesky(covariance).T @ W @ torch.linalg.cholesky(metric))
    assert best == pytest.approx(values[RANK:].square().sum().item(), rel=1e-9)
    left, plain, right = torch.linalg.svd(W)
    assert best < 0.9 * loss(W, (left[:, :RANK] * plain[:RANK]) @ right[:RANK], covariance, metric)
    for seed in range(10):
        moved = (U + 0.02 * normal(WIDTH, RANK, seed=seed)) @ (V + 0.02 * normal(WIDTH, RANK, seed=seed + 50)).T
        assert loss(W, moved, covariance, metric) > best


def test_columns_of_both_sides_are_of_one_length():
    U, V = cut_to_rank(normal(WIDTH, WIDTH), RANK, 100 * symmetric(1), symmetric(2))
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=0))


@pytest.mark.parametrize("metric", [None, symmetric(2), symmetric(2, rank=5)], ids=["none", "full", "singular"])
@pytest.mark.parametrize("covariance", [symmetric(1), symmetric(1, rank=5)], ids=["full", "singular"])
def test_at_full_rank_nothing_is_cut(covariance, metric):
    W = normal(WIDTH, WIDTH)
    U, V = cut_to_rank(W, WIDTH, covariance, metric)
    torch.testing.assert_close(U @ V.T, W, rtol=1e-8, atol=1e-8)


def test_directions_that_do_not_occur_are_cut_first():
    W, rank = normal(WIDTH, WIDTH), 5
    covariance = symmetric(1, rank=rank)  # in the rest of the space there are no residuals
    U, V = cut_to_rank(W, rank, covariance)
    whole = loss(W, torch.zeros_like(W), covariance, torch.eye(WIDTH).double())
    assert loss(W, U @ V.T, covariance, torch.eye(WIDTH).double()) < 1e-2 * whole


def test_no_map_is_cut_to_no_map():
    U, V = cut_to_rank(torch.zeros(WIDTH, WIDTH).double(), RANK, symmetric(1), symmetric(2))
    assert torch.equal(U, torch.zeros_like(U)) and V.isfinite().all()
