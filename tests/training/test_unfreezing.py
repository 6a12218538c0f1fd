import pytest

from consistency_lens.training.unfreezing import Unfreezing

# unit -> how step 20 and a warm-up of 10 steps are said in a run of 200 steps, 40 an epoch
UNITS = {"steps": ("20s", "10s"), "epochs": ("0.5e", "0.25e"), "percent": ("10%", "5%")}


@pytest.mark.parametrize("unit", UNITS)
def test_a_group_stands_still_and_then_warms_up(unit):
    start, warmup = UNITS[unit]
    plan = Unfreezing.resolve([f"base {start} warmup {warmup}", f"encoder_base {start}"], 40, 200)
    assert [plan.is_frozen("decoder_base", step) for step in (0, 19, 20, 199)] == [True, True, False, False]
    assert [plan.factor("decoder_base", step) for step in (0, 19)] == [0, 0]
    factors = [plan.factor("decoder_base", step) for step in (20, 24, 29, 30, 199)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])  # its first step moves
    assert [plan.factor("encoder_base", step) for step in (19, 20)] == [0, 1]
    assert not plan.is_frozen("decoder_prompts", 0) and plan.factor("decoder_prompts", 0) == 1


def test_epochs_of_unknown_length_are_an_error():
    with pytest.raises(ValueError, match="counts epochs"):
        Unfreezing.resolve(["base 1e"], None, 200)
