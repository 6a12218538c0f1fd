"""KPIs of a suite that is made up, so that each is known."""

import dataclasses
import math

import numpy as np
import pytest
from made_up_readings import AT_DEPTHS, LAYERS, ONE, kpis, reading

from consistency_lens.tuned_lens.kpis import TEMPERATURES, earliness_shift, first_layer_within


def values(figures):
    return [figure.value for figure in figures]


class TestDeltaKL:
    def test_is_the_median_over_all_positions_of_all_prompts(self):
        found = kpis(reading("a", 3, (0.5, 1, 2)), reading("b", 4, (0.25, 3, -1)), reading("c", 1, (8, 8, 8)))
        # 3, 4 and 1 positions: of 8 values in order, the mean of the 4th and 5th
        assert values(found.delta_kl_bits) == pytest.approx([(0.25 + 0.5) / 2, 3, (-1 + 2) / 2])
        assert found.positions == 8

    def test_there_is_none_of_a_norm_lens_that_was_not_calibrated(self):
        found = kpis(reading(delta=(1, 2, 3), calibrated=None))
        assert found.delta_kl_bits_vs_calibrated_norm == (None, None, None)
        assert values(found.delta_kl_bits) == pytest.approx([1, 2, 3])
        assert found.last_layer_kl_after_temp_bits.value == 0

    def test_of_the_calibrated_norm_lens_stands_beside_it(self):
        found = kpis(reading(delta=(1, 2, 3), calibrated=0.75))
        assert values(found.delta_kl_bits) == pytest.approx([1, 2, 3])
        assert values(found.delta_kl_bits_vs_calibrated_norm) == pytest.approx([0.25, 1.25, 2.25])

    def test_is_of_the_layers_at_the_depths_alone(self):
        changed = reading(delta=(1, 1, 1))
        changed.norm_kl[[0, 2, 3, 5, 7, 8]] = 100
        assert values(kpis(changed).delta_kl_bits) == pytest.approx([1, 1, 1])


class TestEarliness:
    def test_counts_layers_by_which_a_rank_is_reached_before_the_norm_lens(self):
        norm = np.array([50, 40, 30, 20, 10, 6, 5, 2, 1])
        tuned = np.array([50, 9, 5, 5, 5, 5, 1, 1, 1])
        assert [earliness_shift(norm, tuned, most) for most in (10, 5, 1)] == [3, 4, 2]
        assert earliness_shift(tuned, norm, 10) == -3

    def test_takes_a_rank_that_is_never_reached_for_one_reached_after_the_last_layer(self):
        never, last = np.full(LAYERS, 20), np.array([20] * (LAYERS - 1) + [1])
        assert first_layer_within(never, 10) is None
        assert earliness_shift(never, never, 10) == 0
        assert earliness_shift(never, last, 10) == 1
        assert earliness_shift(last, never, 10) == -1

    def test_is_the_first_time_even_if_the_rank_is_lost_again(self):
        assert first_layer_within(np.array([30, 3, 30, 2]), 5) == 1

    def test_medians_and_shares_are_over_prompts_with_an_answer(self):
        late = [99] * 6 + [1] * 3
        readings = [
            reading("a", norm_rank=late, tuned_rank=[99] * 2 + [1] * 7),  # 4 earlier
            reading("b", norm_rank=late, tuned_rank=[99] * 3 + [1] * 6),  # 3
            reading("c", norm_rank=late, tuned_rank=late),  # 0
            reading("d"),
        ]
        found = kpis(*readings)
        assert values(found.earliness_shift) == [3, 3, 3]
        assert values(found.earlier_share) == pytest.approx([1 / 3, 2 / 3])  # at least 4, at least 2
        assert (found.prompts, found.prompts_with_answer) == (4, 3)

    def test_there_is_none_without_answers(self):
        found = kpis(reading())
        assert found.earliness_shift == (None, None, None)
        assert found.earlier_share == (None, None)
        assert found.rank1_coverage_gain is None
        assert found.as_dict()["ci95"]["rank1_coverage_gain"] is None


def test_coverage_gain_is_the_share_of_layers_with_the_answer_on_top():
    ranks = {"norm_rank": [2] * 8 + [1], "tuned_rank": [2] * 5 + [1] * 4}  # 1 and 4 of 9 layers
    same = {"norm_rank": [2] * 8 + [1], "tuned_rank": [2] * 8 + [1]}
    assert kpis(reading(**ranks), reading("b", **same)).rank1_coverage_gain.value == pytest.approx(3 / 9 / 2)


class TestLastLayer:
    def test_is_the_mean_at_one_temperature_for_all_prompts(self):
        found = kpis(reading("a", 3, last=0.25, best=40), reading("b", 1, last=0.5, best=10))
        # at temperature 40 the second prompt's single position has 1.5
        assert found.last_layer_kl_after_temp_bits.value == pytest.approx((3 * 0.25 + 1.5) / 4)
        assert found.last_layer_temperature == pytest.approx(TEMPERATURES[40])

    def test_the_temperature_1_is_among_them(self):
        assert TEMPERATURES[ONE] == 1
        assert TEMPERATURES[[0, -1]] == pytest.approx([0.5, 2])


class TestIntervals:
    def test_are_of_no_width_where_all_prompts_agree_and_of_some_where_they_differ(self):
        same = kpis(*(reading(str(i), delta=(1, 1, 1)) for i in range(5))).delta_kl_bits[0]
        assert (same.low, same.value, same.high) == (1, 1, 1)
        differing = kpis(*(reading(str(i), delta=(i, i, i)) for i in range(5))).delta_kl_bits[0]
        assert 0 <= differing.low < differing.value == 2 < differing.high <= 4

    def test_draw_prompts_not_positions(self):
        # one prompt with nearly all positions is drawn or not, so the median jumps between the two
        found = kpis(reading("a", 100, (1, 1, 1)), reading("b", 2, (0, 0, 0)), num_resamples=200).delta_kl_bits[0]
        assert (found.low, found.high) == (0, 1)

    def test_depend_on_the_seed_alone(self):
        readings = [reading(str(i), norm_rank=[9] * 9, tuned_rank=[9] * i + [1] * (9 - i)) for i in range(7)]
        assert kpis(*readings) == kpis(*readings)
        assert kpis(*readings, seed=1) != kpis(*readings)


def test_the_block_has_the_names_of_the_plan_and_numbers_alone():
    ranks = {"norm_rank": [2] * 8 + [1], "tuned_rank": [1] * 9}
    block = kpis(reading(delta=(0.5, 1, 2), **ranks)).as_dict()
    assert block["median_delta_kl_bits@{25,50,75}%"] == pytest.approx([0.5, 1, 2])
    assert block["earliness_shift_first_rank_le_{10,5,1}"] == [0, 0, 8]
    assert block["last_layer_kl_after_temp_bits"] == 0
    assert block["rank1_coverage_gain"] == pytest.approx(8 / 9)
    assert block["layers@{25,50,75}%"] == AT_DEPTHS
    assert block["ci95"]["rank1_coverage_gain"] == pytest.approx([8 / 9, 8 / 9])


def test_no_prompts_are_an_error():
    with pytest.raises(ValueError, match="kpis: got no prompts"):
        kpis()


def test_a_kpi_that_is_not_a_number_stays_one():
    broken = dataclasses.replace(reading(), tuned_kl=np.full((LAYERS, 3), np.nan))
    assert math.isnan(kpis(broken).delta_kl_bits[0].value)
