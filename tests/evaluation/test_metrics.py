import math

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from consistency_lens.evaluation import metrics
from consistency_lens.evaluation.metrics import (
    bootstrap_interval,
    bootstrap_sums,
    cosine,
    distinct_n,
    fve,
    fve_nrm,
    kl_recovered,
    perplexity,
    start_token,
    text_nll,
    top1_agreement,
    unused_token_share,
)
from consistency_lens.subject import Subject


def activations(rows: int = 50, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Rows with another mean and another scale in each dimension."""
    normal = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return normal * torch.linspace(0.5, 4, width) + torch.linspace(-3, 3, width)


def mean_of(columns):
    return columns["value"] / columns["rows"]


def correlated_rows(num_documents: int, rows_each: int, seed: int):
    """Values around 0 whose document adds as much as the row itself, and the documents."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_documents, 1, generator=generator)
    values = (shared + torch.randn(num_documents, rows_each, generator=generator)).flatten()
    documents = torch.arange(num_documents).repeat_interleave(rows_each)
    return {"value": values, "rows": torch.ones_like(values)}, documents


class TestFVE:
    def test_is_1_for_the_identity_and_0_for_the_mean(self):
        target = activations()
        mean = target.mean(0)
        assert fve(target, target, mean) == 1
        assert fve(target, mean.expand_as(target), mean) == 0

    def test_is_negative_for_a_bias(self):
        target = activations()
        mean = target.mean(0)
        assert fve(target, (mean + 1).expand_as(target), mean) < 0

    def test_sums_over_rows_and_dimensions_before_dividing(self):
        target = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
        prediction = torch.tensor([[1.0, 0.0], [4.0, 1.0]])
        # errors 1 + 1, variances 1 + 9 around the given mean
        assert fve(target, prediction, torch.tensor([1.0, 0.0])).item() == pytest.approx(1 - 2 / 10)

    def test_of_directions_does_not_see_lengths(self):
        target = activations()
        lengths = torch.linspace(0.5, 3, len(target))[:, None]
        assert fve_nrm(target, lengths * target).item() == pytest.approx(1)

    def test_of_directions_against_the_formula(self):
        target, prediction = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [7.0, 0.0]])
        # unit rows (1,0), (0,1) around (.5,.5): variance 2 * .5; errors 0 and 2
        assert fve_nrm(target, prediction).item() == pytest.approx(1 - 2 / 1)


class TestOtherMetrics:
    def test_cosine_is_averaged_over_rows(self):
        target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        prediction = torch.tensor([[9.0, 0.0], [0.0, 2.0]])
        assert cosine(target, prediction).item() == pytest.approx(0.5)

    def test_kl_recovered_is_0_for_the_mean_and_1_for_no_kl(self):
        kl_mean = torch.tensor([1.0, 3.0])
        assert kl_recovered(kl_mean, kl_mean) == 0
        assert kl_recovered(torch.zeros(2), kl_mean) == 1

    def test_kl_recovered_is_a_ratio_of_sums(self):
        assert kl_recovered(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])).item() == pytest.approx(0.5)

    def test_top1_agreement_is_the_share_of_equal_first_tokens(self):
        logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
        other = torch.tensor([[0.0, 9.0], [0.0, 1.0], [2.0, 3.0], [5.0, 0.0]])
        assert top1_agreement(logits, other) == 0.75

    def test_perplexity_of_even_odds_is_their_number(self):
        assert perplexity(torch.full((3, 4), math.log(7))).item() == pytest.approx(7)

    def test_perplexity_counts_tokens_not_texts(self):
        nll = torch.tensor([[0.0, 3.0], [100.0, 3.0]])
        mask = torch.tensor([[True, True], [False, True]])
        assert perplexity(nll, mask).item() == pytest.approx(math.exp(2))

    def test_distinct_n_counts_over_all_texts_and_not_across_them(self):
        ids = torch.tensor([[1, 2, 1, 2], [2, 1, 3, 1]])
        # 12 21 12 | 21 13 31
        assert distinct_n(ids, 2) == pytest.approx(4 / 6)

    def test_distinct_n_of_shorter_texts(self):
        assert distinct_n(torch.tensor([[1], [1]]), 2) == 1

    def test_distinct_n_leaves_out_what_is_no_text(self):
        ids = torch.tensor([[1, 2, 9, 9], [1, 2, 9, 9]])
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
        # 12 | 12 29
        assert distinct_n(ids, 2, mask) == pytest.approx(2 / 3)
        assert distinct_n(ids, 2, torch.zeros_like(mask)) == 1

    def test_unused_token_share_is_of_the_vocabulary(self):
        ids, vocabulary = torch.tensor([[3, 4], [4, 9]]), torch.tensor([3, 4, 5, 6, 7])
        assert unused_token_share(ids, vocabulary) == pytest.approx(3 / 5)
        assert unused_token_share(ids, vocabulary, torch.tensor([[0, 1], [1, 1]])) == pytest.approx(4 / 5)
        assert unused_token_share(vocabulary[None], vocabulary) == 0


class TestTextNLL:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_equals_a_full_forward_for_each_text(self, family):
        subject = Subject(tiny_model(family), 1)
        ids, _ = random_tokens(5, 5, 5)
        # whole, padded on the left, padded on the right
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
        nll = text_nll(subject, ids, mask)
        for row in range(3):
            text = ids[row][mask[row]]
            log_p = subject.model(torch.cat([torch.tensor([1]), text])[None]).logits[0, :-1].log_softmax(-1)
            expected = -log_p.gather(1, text[:, None])[:, 0]
            torch.testing.assert_close(nll[row][mask[row]], expected, rtol=1e-5, atol=1e-5)
        assert nll[~mask].eq(0).all()

    def test_without_mask_counts_every_token(self):
        subject = Subject(tiny_model("llama"), 1)
        ids, _ = random_tokens(5, 5)
        assert torch.equal(text_nll(subject, ids), text_nll(subject, ids, torch.ones_like(ids)))

    def test_starts_with_eos_where_there_is_no_bos(self):
        config = tiny_model("llama").config
        config.bos_token_id, config.eos_token_id = None, [5, 6]
        assert start_token(config) == 5

    def test_a_subject_without_bos_and_eos_is_an_error(self):
        config = tiny_model("llama").config
        config.bos_token_id = config.eos_token_id = None
        with pytest.raises(ValueError, match="neither bos_token_id nor eos_token_id"):
            start_token(config)


class TestBootstrap:
    def test_95_percent_intervals_cover_as_often(self):
        runs = 200
        covered = 0
        for seed in range(runs):
            low, high = bootstrap_interval(mean_of, *correlated_rows(40, 3, seed), num_resamples=300, seed=seed)
            covered += low <= 0 <= high
        assert 0.88 <= covered / runs <= 0.99

    def test_95_percent_intervals_of_fve_cover_as_often(self):
        runs, num_documents, rows_each, truth = 200, 40, 3, 0.6
        documents = torch.arange(num_documents).repeat_interleave(rows_each)
        covered = 0
        for seed in range(runs):
            generator = torch.Generator().manual_seed(seed)
            # Some documents are far from the mean and hard to explain: rows of one are alike.
            scale = torch.randn(num_documents, generator=generator).exp()[documents]
            variance = scale * torch.rand(len(documents), generator=generator)
            left = 2 * (1 - truth) * torch.rand(len(documents), generator=generator)
            columns = {"variance": variance, "error": left * variance}
            low, high = bootstrap_interval(
                lambda s: 1 - s["error"] / s["variance"], columns, documents, num_resamples=300, seed=seed
            )
            covered += low <= truth <= high
        assert 0.88 <= covered / runs <= 0.99

    def test_is_by_document(self):
        columns, documents = correlated_rows(40, 10, seed=0)
        low, high = bootstrap_interval(mean_of, columns, documents)
        row_low, row_high = bootstrap_interval(mean_of, columns, torch.arange(len(documents)))
        assert high - low > 1.5 * (row_high - row_low)

    def test_resampled_sums_scatter_around_the_sums(self):
        columns, documents = correlated_rows(40, 3, seed=0)
        sums = bootstrap_sums(columns, documents, num_resamples=4000)
        assert sums["rows"].eq(120).all()
        spread = sums["value"].std() / math.sqrt(4000)
        assert abs(sums["value"].mean() - columns["value"].sum()) < 5 * spread

    def test_a_seed_fixes_the_interval_whatever_fits_in_memory(self, monkeypatch):
        columns, documents = correlated_rows(40, 3, seed=0)
        interval = bootstrap_interval(mean_of, columns, documents, num_resamples=50)
        assert bootstrap_interval(mean_of, columns, documents, num_resamples=50) == interval
        assert bootstrap_interval(mean_of, columns, documents, num_resamples=50, seed=1) != interval
        monkeypatch.setattr(metrics, "BOOTSTRAP_BLOCK", 280)  # 7 resamples at a time
        assert bootstrap_interval(mean_of, columns, documents, num_resamples=50) == interval

    def test_one_document_has_an_interval_of_no_width(self):
        columns, documents = correlated_rows(1, 5, seed=0)
        low, high = bootstrap_interval(mean_of, columns, documents)
        assert low == pytest.approx(high)

    def test_a_wider_level_gives_a_wider_interval(self):
        rows = correlated_rows(40, 3, seed=0)
        low, high = bootstrap_interval(mean_of, *rows, level=0.95)
        narrow_low, narrow_high = bootstrap_interval(mean_of, *rows, level=0.5)
        assert low < narrow_low < narrow_high < high
