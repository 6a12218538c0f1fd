import pytest
import torch

from consistency_lens.tuned_lens.preconditioner import VARIANCE_FLOOR, Preconditioner

ROWS, WIDTH = 500, 8


def hidden() -> torch.Tensor:
    """Correlated rows off centre, dimensions of very different variance."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return rows * torch.logspace(-1, 1, WIDTH) + 3


def fitted(rotated: bool, rows: torch.Tensor) -> Preconditioner:
    basis = Preconditioner(WIDTH, rotated)
    basis.fit(rows.double().mean(dim=0), torch.cov(rows.double().T, correction=0))
    return basis


@pytest.mark.parametrize("rotated", [True, False])
def test_it_is_the_identity_until_it_is_fitted(rotated):
    rows = hidden()
    assert torch.equal(Preconditioner(WIDTH, rotated)(rows), rows)


@pytest.mark.parametrize("rotated", [True, False])
def test_what_goes_in_comes_back(rotated):
    rows = hidden()
    basis = fitted(rotated, rows)
    torch.testing.assert_close(basis.inverse(basis(rows)), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotated", [True, False])
def test_its_matrix_is_what_it_does(rotated):
    rows = hidden()
    basis = fitted(rotated, rows)
    torch.testing.assert_close(basis(rows), ((rows - basis.mean).double() @ basis.matrix()).float())


def test_whitening_centres_and_scales_each_dimension():
    covariance = torch.cov(fitted(False, hidden())(hidden()).T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(WIDTH), rtol=1e-4, atol=1e-4)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 0.1
    assert fitted(False, hidden())(hidden()).mean(dim=0).abs().max() < 1e-4


def test_prism_rotates_to_the_principal_axes_largest_first():
    basis = fitted(True, hidden())
    covariance = torch.cov(basis(hidden()).T, correction=0)
    variances = covariance.diagonal()
    assert (covariance - torch.diag(variances)).abs().max() < 1e-4
    assert (variances.diff() < 1e-5).all() and variances[0] > 2 * variances[-1]
    torch.testing.assert_close(basis.rotation @ basis.rotation.T, torch.eye(WIDTH), rtol=0, atol=1e-5)
    largest = basis.rotation.abs().argmax(dim=0)
    assert (basis.rotation[largest, torch.arange(WIDTH)] > 0).all()


@pytest.mark.parametrize("rotated", [True, False])
def test_a_dimension_that_does_not_vary_stays_finite(rotated):
    rows = hidden()
    rows[:, 2] = 1.0
    basis = fitted(rotated, rows)
    floor = VARIANCE_FLOOR * torch.cov(rows.T, correction=0).diagonal().mean()
    torch.testing.assert_close(basis.scale[2], floor.sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(basis.inverse(basis(rows)), rows, rtol=1e-4, atol=1e-4)


def test_it_comes_to_where_the_residuals_are():
    away = torch.empty(3, WIDTH, device="meta")
    basis = fitted(True, hidden())
    assert basis(away).device.type == basis.inverse(away).device.type == "meta"
