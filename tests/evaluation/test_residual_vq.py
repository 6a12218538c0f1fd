import pytest
import torch

from consistency_lens.evaluation import residual_vq
from consistency_lens.evaluation.residual_vq import ResidualQuantiser, k_means, nearest


def vectors(rows: int, seed: int = 0) -> torch.Tensor:
    """Vectors of 8 dimensions around 20 centres."""
    centres = 2 * torch.randn(20, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(centres), (rows,), generator=generator)
    return centres[chosen] + 0.5 * torch.randn(rows, 8, generator=generator)


def errors(quantiser: ResidualQuantiser, held_out: torch.Tensor) -> torch.Tensor:
    """|x - quantised x|² with the first 0, 1, ..., T codebooks, (T + 1, rows)."""
    nested = [ResidualQuantiser(quantiser.codebooks[:count]) for count in range(len(quantiser.codebooks) + 1)]
    return torch.stack([(held_out - part(held_out)).square().sum(1) for part in nested])


class TestResidualQuantiser:
    def test_is_monotone_in_the_number_of_codebooks_on_held_out_vectors(self):
        quantiser = ResidualQuantiser.fit(vectors(600), num_codebooks=5, vocab_size=32)
        of_rows = errors(quantiser, vectors(200, seed=1))
        # greedy choice with zero among the codes: true of every row, not only of their sum
        assert (of_rows.diff(dim=0) <= 1e-5).all()
        assert (of_rows.sum(1).diff() < 0).all()

    def test_never_makes_a_vector_worse_that_is_like_no_other(self):
        quantiser = ResidualQuantiser.fit(vectors(600) + 10, num_codebooks=1, vocab_size=32)
        strange = 0.1 * vectors(50, seed=1)
        assert torch.equal(quantiser(strange), torch.zeros_like(strange))

    def test_explains_held_out_vectors_of_the_same_kind(self):
        quantiser = ResidualQuantiser.fit(vectors(600), num_codebooks=2, vocab_size=64)
        of_rows = errors(quantiser, vectors(200, seed=1)).sum(1)
        assert 1 - of_rows[2] / of_rows[0] > 0.9

    def test_has_as_many_codes_as_a_vocabulary_where_there_are_rows_for_them(self):
        few, many = (ResidualQuantiser.fit(vectors(400), num_codebooks=3, vocab_size=size) for size in (16, 10**6))
        assert [len(codes) for codes in few.codebooks] == [16] * 3
        assert [len(codes) for codes in many.codebooks] == [400 // residual_vq.ROWS_PER_CODE] * 3

    @pytest.mark.parametrize("rows", [1, 7])
    def test_of_hardly_any_rows_says_nothing(self, rows):
        quantiser = ResidualQuantiser.fit(vectors(rows), num_codebooks=2, vocab_size=32)
        assert torch.equal(quantiser(vectors(5)), torch.zeros(5, 8))

    def test_follows_the_seed_and_leaves_the_global_state_alone(self):
        state = torch.random.get_rng_state()
        first, again, other = (ResidualQuantiser.fit(vectors(300), 2, 16, seed)(vectors(40)) for seed in (0, 0, 1))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestKMeans:
    def test_lowers_the_error_of_the_vectors_that_it_starts_from(self, monkeypatch):
        def error(iterations):
            monkeypatch.setattr(residual_vq, "LLOYD_ITERATIONS", iterations)
            codes = k_means(vectors(600), 16, torch.Generator().manual_seed(0))
            return (vectors(600) - codes[nearest(vectors(600), codes)]).square().sum()

        assert error(4) < 0.9 * error(0)

    def test_keeps_zero_as_the_first_code_and_no_other_in_its_place(self):
        codes = k_means(vectors(600) + 3, 16, torch.Generator().manual_seed(0))
        assert codes[0].eq(0).all()
        assert codes[1:].abs().sum(1).gt(1).all()

    @pytest.mark.parametrize("seed", range(6))
    def test_a_code_that_one_vector_is_nearest_to_is_that_vector(self, seed):
        codes = k_means(torch.tensor([[0.1], [0.2], [10.0]]), 2, torch.Generator().manual_seed(seed))
        assert codes.tolist() == [[0.0], [10.0]]

    def test_leaves_the_vectors_as_they_are(self):
        given = vectors(100)
        k_means(given, 16, torch.Generator().manual_seed(0))
        assert torch.equal(given, vectors(100))

    @pytest.mark.parametrize("elements", [1, 50, 10**6])
    def test_nearest_is_nearest_whatever_fits_in_memory(self, monkeypatch, elements):
        monkeypatch.setattr(residual_vq, "CHUNK_ELEMENTS", elements)
        rows, codes = vectors(30), vectors(12, seed=1)
        assert torch.equal(nearest(rows, codes), torch.cdist(rows, codes).argmin(1))
