import dataclasses
import math

import pytest

from consistency_lens.schedules import Schedule, parse_duration


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("500s", 500), ("500", 500), (500, 500), ("0s", 0), ("2e", 240), ("0.5e", 60), (".25e", 30), ("10%", 100)]
    + [("2.5%", 25), ("100%", 1000), (" 7s ", 7), ("0.004e", 0), ("0.3%", 3)],
)
def test_durations(duration, steps):
    assert parse_duration(duration, steps_per_epoch=120, total_steps=1000) == steps


@pytest.mark.parametrize("duration", ["", "s", "-5s", "1.5s", "5 steps", "e", "10 %", "1e5", "nan%", 0.5, None])
def test_what_is_no_duration_is_shown_the_grammar(duration):
    with pytest.raises(ValueError, match=r"not a duration: .*'500s' or 500 \(steps\), '0\.5e' \(epochs\) or '10%'"):
        parse_duration(duration, 120, 1000)


def test_epochs_of_unknown_length_are_an_error():
    assert parse_duration("5%", None, 1000) == 50
    with pytest.raises(ValueError, match="'0.5e' counts epochs, but the data has no known length; write steps"):
        parse_duration("0.5e", None, 1000)


SCHEDULES = [
    # a constant is a bare number, or says so
    (0.3, {0: 0.3, 500: 0.3, 2000: 0.3}),
    (2, {0: 2.0, 1000: 2.0}),
    ("-1e-3", {0: -1e-3, 1000: -1e-3}),
    ("constant 1.0", {0: 1.0, 1000: 1.0}),
    ("constant 2 warmup 100s", {0: 0.0, 50: 1.0, 99: 1.98, 100: 2.0, 1000: 2.0}),
    # each kind: at its start, in the middle, at its end and beyond
    ("linear 0 -> 1 over 50%", {0: 0.0, 1: 0.002, 250: 0.5, 500: 1.0, 501: 1.0, 5000: 1.0}),
    ("linear 1->0.5 over 100s", {0: 1.0, 50: 0.75, 100: 0.5}),
    ("cosine 1 -> 0.1 over 2e", {0: 1.0, 60: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 120: 0.55, 240: 0.1, 900: 0.1}),
    ("exponential 2 -> 0.5 over 500s", {0: 2.0, 250: 1.0, 500: 0.5, 1000: 0.5}),
    # the run's rest, where nothing else is said
    ("linear 0 -> 1", {0: 0.0, 500: 0.5, 1000: 1.0}),
    ("linear 1 -> 0 warmup 100s hold 10%", {50: 0.5, 100: 1.0, 200: 1.0, 600: 0.5, 1000: 0.0}),
    # warm-up, hold, change, end: every corner, and both sides of it
    (
        "cosine 1 -> 0 over 200s warmup 100s hold 10%",
        {0: 0, 1: 0.01, 99: 0.99, 100: 1, 200: 1, 201: (1 + math.cos(math.pi / 200)) / 2, 300: 0.5, 400: 0, 401: 0},
    ),
    ("exponential 4 -> 1 hold 0.5e warmup 1e over 100s", {60: 2.0, 120: 4.0, 180: 4.0, 230: 2.0, 280: 1.0}),
    # a warm-up may start elsewhere than at 0
    ("constant 2 warmup 100s from 0.5", {0: 0.5, 50: 1.25, 100: 2.0, 1000: 2.0}),
    ("linear 1 -> 0 over 100s warmup 1e from 0.1", {0: 0.1, 60: 0.55, 119: 0.9925, 120: 1.0, 170: 0.5, 220: 0.0}),
    # a polynomial: what is left of the change, to that power
    ("polynomial 1 -> 0 power 2", {0: 1.0, 500: 0.25, 900: 0.01, 1000: 0.0}),
    ("polynomial 2 -> 1 power 0.5 over 100s hold 10s", {10: 2.0, 85: 1.5, 110: 1.0, 500: 1.0}),
    # restarts: cosines one after the other, cut where the change ends
    ("restarts 1 -> 0 every 100s", {0: 1.0, 50: 0.5, 100: 1.0, 150: 0.5, 999: 0.5 * (1 + math.cos(0.99 * math.pi))}),
    ("restarts 1 -> 0 every 10%", {0: 1.0, 50: 0.5, 100: 1.0, 950: 0.5, 1000: 0.0}),
    (
        "restarts 1 -> 0.2 every 1e times 2 over 600s warmup 10s hold 5s",
        {5: 0.5, 10: 1.0, 15: 1.0, 75: 0.6, 135: 1.0, 255: 0.6, 375: 1.0, 615: 0.2, 999: 0.2},
    ),
    ("restarts 1 -> 0 every 0.001% over 5s", {0: 1.0, 1: 1.0, 4: 1.0, 5: 0.0}),  # no cycle is shorter than a step
    # a change in no time is a jump
    ("linear 1 -> 3 over 0s hold 10s", {0: 1.0, 9: 1.0, 10: 3.0}),
]


@pytest.mark.parametrize(("text", "values"), SCHEDULES, ids=[str(text) for text, _ in SCHEDULES])
def test_schedules(text, values):
    schedule = Schedule.parse(text).resolve(steps_per_epoch=120, total_steps=1000)
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-12)


# kind -> what has to be said of it beside its ends, and how far it has come in the middle of its change
CHANGES = {
    "linear": ("", 0.5),
    "cosine": ("", 0.5),
    "polynomial": ("power 3", 1 - 0.5**3),
    "exponential": ("", None),
    "restarts": ("every {change}", 0.5),
}
# unit -> durations of warm-up, hold and change that are 50, 30 and 200 steps of a run of 1000 steps, 100 an epoch
UNITS = {"steps": ("50s", "30s", "200s"), "epochs": ("0.5e", ".3e", "2e"), "percent": ("5%", "3%", "20%")}


@pytest.mark.parametrize("held", [False, True], ids=["at once", "held"])
@pytest.mark.parametrize("warmed", ["", "warmup {}", "warmup {} from 0.1"], ids=["cold", "warm", "from"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", CHANGES)
def test_every_kind_in_every_unit(kind, unit, warmed, held):
    """At step 0, at every corner and both sides of it, in the middle of each phase, at the end and beyond."""
    warmup, hold, change = UNITS[unit]
    more, middle = CHANGES[kind]
    text = f"{kind} 0.8 -> 0.2 over {change} {more.format(change=change)} {warmed.format(warmup)}"
    schedule = Schedule.parse(text + (f" hold {hold}" if held else "")).resolve(steps_per_epoch=100, total_steps=1000)
    top, low = (50 if warmed else 0), (0.1 if "from" in warmed else 0.0)
    begin = top + (30 if held else 0)
    half = 0.4 if middle is None else 0.8 - 0.6 * middle
    expected = {begin: 0.8, begin + 100: half, begin + 200: 0.2, begin + 201: 0.2, 999: 0.2, 1000: 0.2, 5000: 0.2}
    if warmed:
        expected |= {0: low, 25: (low + 0.8) / 2, 49: low + (0.8 - low) * 0.98}
    if held:
        expected |= {top: 0.8, top + 1: 0.8, begin - 1: 0.8}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-12)
    assert schedule(begin - 1 if held else begin) == 0.8 > schedule(begin + 1) > schedule(begin + 199) > 0.2


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("warmed", [False, True])
def test_a_constant_in_every_unit(unit, warmed):
    schedule = Schedule.parse("constant 0.8" + (f" warmup {UNITS[unit][0]}" if warmed else "")).resolve(100, 1000)
    expected = {0: 0.0, 25: 0.4, 49: 0.784} if warmed else {0: 0.8, 25: 0.8}
    expected |= {50: 0.8, 999: 0.8, 1000: 0.8, 5000: 0.8}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", CHANGES)
def test_the_end_value_is_reached_to_the_bit(kind):
    more = CHANGES[kind][0].format(change="3s")
    assert Schedule.parse(f"{kind} 0.7 -> 0.1 over 7s {more}").resolve(None, 10)(7) == 0.1


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_never_turns_back(kind):
    more = CHANGES[kind][0].format(change="50s")
    schedule = Schedule.parse(f"{kind} 3 -> 0.2 over 50s hold 5s {more}").resolve(None, 100)
    values = [schedule(step) for step in range(100)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "text",
    ["", "quick", "linear 1", "linear 1 -> ", "linear 1 to 2", "constant", "constant 1 -> 2", "polynomial 1 -> 0"]
    + ["linear 0 -> 1 over", "linear 0 -> 1 for 10s", "constant 1 hold 5s", "linear 0 -> 1 over 5s over 6s"]
    + ["linear 1 -> 0 power 2", "cosine 1 -> 0 every 5s", "restarts 1 -> 0", "restarts 1 -> 0 times 2"]
    + ["polynomial 1 -> 0 power two", "constant 1 from 0.1", "linear 1 -> 0 warmup 5s from 10%"],
)
def test_what_is_no_schedule_is_shown_the_grammar(text):
    with pytest.raises(ValueError, match=r"^not a schedule: .*cosine\|exponential A -> B \[over DURATION\]") as error:
        Schedule.parse(text)
    assert "\n" not in str(error.value)


def test_a_bad_duration_is_found_when_the_schedule_is_read():
    with pytest.raises(ValueError, match="not a duration: '5x'"):
        Schedule.parse("linear 0 -> 1 over 5x")


@pytest.mark.parametrize("text", ["exponential 0 -> 1 over 5s", "exponential 1 -> 0", "exponential -1 -> 1"])
def test_an_exponential_needs_positive_ends(text):
    with pytest.raises(ValueError, match="an exponential schedule needs positive ends, got"):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polynomial 1 -> 0 power 0", "needs a positive power, got 0"),
        ("restarts 1 -> 0 every 5s times 0.5", "1 or more"),
    ],
)
def test_numbers_out_of_range_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("text", "lowest"),
    [("2", 2), ("linear 3 -> 1", 1), ("linear 3 -> 1 warmup 5s", 0), ("linear 3 -> 1 warmup 5s from 0.5", 0.5)],
)
def test_the_lowest_value(text, lowest):
    assert Schedule.parse(text).lowest() == lowest


def test_zero_is_zero_throughout():
    assert [Schedule.parse(text).is_zero() for text in ("0", "linear 0 -> 1", "constant 0 warmup 5s from 1")] == [
        True, False, False,
    ]  # fmt: skip


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule.parse(1.0).start = 2.0
