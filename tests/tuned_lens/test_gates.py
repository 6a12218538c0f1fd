"""Each gate passes at its boundary and fails just beyond it."""

import dataclasses
import json
import math

import pytest
from made_up_readings import kpis as kpis_of
from made_up_readings import reading

from consistency_lens.tuned_lens.gates import REQUIREMENTS, Judgement, apply_to_provenance, check_letters, judge
from consistency_lens.tuned_lens.kpis import Estimate, KPIs

SUITE = {"name": "made up", "prompts": 10}


def exactly(*values):
    return tuple(None if value is None else Estimate(value, value, value) for value in values)


def kpis(**changes):
    """KPIs that lie at the boundary of each gate."""
    boundary = KPIs(
        prompts=10,
        prompts_with_answer=10,
        positions=80,
        num_layers=9,
        delta_kl_bits=exactly(0.2, 0.3, 0.3),
        delta_kl_bits_vs_calibrated_norm=exactly(0, 0, 0),
        earliness_shift=exactly(4, 2, 0),
        earlier_share=exactly(0.6, 0.6),
        last_layer_kl_after_temp_bits=Estimate(0.05, 0, 1),
        last_layer_temperature=1.0,
        rank1_coverage_gain=Estimate(0, 0, 0),
    )
    return dataclasses.replace(boundary, **changes)


def failed(**changes):
    return judge(kpis(**changes)).failed()


def below(value):
    return math.nextafter(value, -math.inf)


def test_all_pass_at_their_boundaries():
    gates = judge(kpis())
    assert gates.passed and gates.failed() == []
    assert gates.as_dict() == {"gate_A": True, "gate_B": True, "gate_C": True, "gate_D": True}


@pytest.mark.parametrize("deltas", [(below(0.2), 1, 1), (1, below(0.3), 1), (1, 1, below(0.3))])
def test_gate_a_wants_each_depth(deltas):
    assert failed(delta_kl_bits=exactly(*deltas)) == ["A"]


@pytest.mark.parametrize("shares", [(below(0.6), 1), (1, below(0.6)), (None, None)])
def test_gate_b_wants_both_shares(shares):
    assert failed(earlier_share=exactly(*shares)) == ["B"]


def test_gate_b_is_of_shares_of_prompts_not_of_the_median_shift():
    late, early = [99] * 8 + [1], [99] * 4 + [1] * 5
    readings = [reading(str(i), norm_rank=late, tuned_rank=early if i < 3 else late) for i in range(5)]
    assert judge(kpis_of(*readings)).gate_b  # 3 of 5
    assert not judge(kpis_of(*readings, reading("6", norm_rank=late, tuned_rank=late))).gate_b  # 3 of 6
    one_layer_too_few = [reading(str(i), norm_rank=late, tuned_rank=[99] * 5 + [1] * 4) for i in range(5)]
    assert not judge(kpis_of(*one_layer_too_few)).gate_b


def test_gate_c_wants_the_model_head():
    assert failed(last_layer_kl_after_temp_bits=Estimate(math.nextafter(0.05, 1), 0, 1)) == ["C"]


@pytest.mark.parametrize("depth", range(3))
def test_gate_d_wants_no_depth_to_lose(depth):
    deltas = [1.0, 1.0, 1.0]
    deltas[depth] = -0.1
    assert failed(delta_kl_bits=exactly(*deltas)) == ["A"]
    deltas[depth] = below(-0.1)
    assert failed(delta_kl_bits=exactly(*deltas)) == ["A", "D"]


def test_what_is_not_a_number_passes_nowhere():
    nan = math.nan
    changes = {
        "delta_kl_bits": exactly(1, nan, 1),
        "earlier_share": exactly(nan, nan),
        "last_layer_kl_after_temp_bits": Estimate(nan, nan, nan),
    }
    assert failed(**changes) == ["A", "B", "C", "D"]


def test_only_required_gates_count():
    gates = judge(kpis(earlier_share=exactly(0, 0)))
    assert gates.failed("ACD") == [] and not gates.passed
    check_letters(["A", "D"])
    with pytest.raises(ValueError, match="gates: got 'E'; any of A, B, C, D"):
        check_letters(["A", "E"])


def test_the_requirements_say_the_numbers():
    assert REQUIREMENTS["A"] == "median ΔKL at least 0.2, 0.3 and 0.3 bits at 25, 50 and 75 % depth"
    assert "rank ≤ 10 at least 4 layers earlier and rank ≤ 5 at least 2" in REQUIREMENTS["B"]
    assert "at least 60% of the prompts" in REQUIREMENTS["B"]


class TestProvenance:
    JUDGEMENT = Judgement(kpis(), judge(kpis()), SUITE)

    def test_gets_kpis_and_acceptance_and_keeps_the_rest(self, tmp_path):
        path = tmp_path / "provenance.json"
        path.write_text(json.dumps({"enabled": True, "kpis": None, "acceptance": None, "seed": 316}))
        apply_to_provenance(tmp_path, self.JUDGEMENT)
        written = json.loads(path.read_text())
        assert list(written) == ["enabled", "kpis", "acceptance", "seed"] and written["seed"] == 316
        assert written["acceptance"] == {"gate_A": True, "gate_B": True, "gate_C": True, "gate_D": True}
        assert written["kpis"]["median_delta_kl_bits@{25,50,75}%"] == [0.2, 0.3, 0.3]
        assert written["kpis"]["suite"] == SUITE

    @pytest.mark.parametrize("content", [None, "{", "[]"])
    def test_that_is_not_there_is_an_error(self, tmp_path, content):
        if content is not None:
            (tmp_path / "provenance.json").write_text(content)
        with pytest.raises(ValueError, match="pass the folder of a fitted"):
            apply_to_provenance(tmp_path, self.JUDGEMENT)
