import json
import logging

import pytest
from lens_runs import tiny_trainer

from consistency_lens.spans import PREFIX
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.profiling import REST, innermost, profile_table, profiled_parts, steps_to_profile


def test_each_moment_belongs_to_the_innermost_span():
    spans = [(10, 50, "loss"), (20, 30, "encoder"), (30, 40, "kl"), (32, 38, "context pass"), (60, 70, "backward")]
    assert innermost(spans, 0, 80) == [
        (0, 10, REST),
        (10, 20, "loss"),
        (20, 30, "encoder"),
        (30, 32, "kl"),
        (32, 38, "context pass"),
        (38, 40, "kl"),
        (40, 50, "loss"),
        (50, 60, REST),
        (60, 70, "backward"),
        (70, 80, REST),
    ]


def annotation(name, begin, end):
    return {"name": name, "cat": "user_annotation", "ts": begin, "dur": end - begin}


def memory(time, size, device=0):
    return {"name": "[memory]", "ts": time, "args": {"Bytes": size, "Device Type": device}}


EVENTS = [
    annotation(PREFIX + "encoder", 0, 1000),
    annotation("Optimizer.step#AdamW.step", 3000, 4000),
    {"name": "aten::mm", "cat": "cpu_op", "ts": 100, "dur": 50, "args": {"External id": 7}},
    # launched in the encoder, run when the optimizer was already at work
    {"name": "gemm", "cat": "kernel", "ts": 3100, "dur": 700, "args": {"External id": 7}},
]
EVENTS += [memory(100, 500), memory(200, -100), memory(3500, 50), memory(150, 10**6, device=1)]


def test_times_and_peaks_are_read_off_a_trace():
    encoder, optimizer, rest = profiled_parts(EVENTS, steps=2)
    assert [part.part for part in (encoder, optimizer, rest)] == ["encoder", "optimizer", REST]
    assert [part.milliseconds for part in (encoder, optimizer, rest)] == [0.5, 0.5, 1.0]
    assert [part.share for part in (encoder, optimizer, rest)] == [0.25, 0.25, 0.5]
    assert [part.peak_bytes for part in (encoder, optimizer, rest)] == [500, 450, None]
    assert encoder.device_milliseconds is None


def test_a_kernel_belongs_to_the_part_that_launched_it():
    encoder, optimizer, _ = profiled_parts(EVENTS, steps=1, on_gpu=True)
    assert (encoder.device_milliseconds, optimizer.device_milliseconds) == (0.7, 0)
    assert encoder.share == 1.0 and encoder.peak_bytes == 10**6
    assert [column.header for column in profile_table([encoder, optimizer], 1).columns][2] == "device ms"


def test_a_profiled_run_leaves_table_and_trace(tmp_path, caplog):
    trainer = tiny_trainer(
        tmp_path, max_steps=4, stages=["gumbel"], lm_reference="subject", source="on_the_fly", profile="2"
    )
    with caplog.at_level(logging.INFO, "consistency_lens"):
        trainer.train()
    profile = json.loads((tmp_path / "run/profile.json").read_text())
    parts = {part["part"]: part for part in profile["parts"]}
    expected = {"data", "context pass", "generation", "encoder", "kl", "lm", "losses", "backward", "optimizer", REST}
    assert profile["steps"] == 2 and set(parts) == expected
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(part["milliseconds"] > 0 for part in parts.values())
    # the logits of three tokens of eight texts are alive from the generation on
    assert parts["generation"]["peak_bytes"] > 8 * 3 * 97 * 4 and parts["backward"]["peak_bytes"] > 8 * 3 * 97 * 4
    names = [
        event.get("name") for event in json.loads((tmp_path / "run/profile_trace.json").read_text())["traceEvents"]
    ]
    assert names.count("lens: generation") == 2 and names.count("lens: data") == 2
    assert "profile of 2 steps" in caplog.text


def test_a_run_that_is_too_short_for_a_profile_says_so(tmp_path, caplog):
    tiny_trainer(tmp_path, max_steps=3, stages=["warm_start"], profile="2").train()
    assert "the run has 3 steps, a profile needs 4" in caplog.text
    assert not (tmp_path / "run/profile.json").exists()


def test_the_setting_is_true_false_or_a_number(tmp_path):
    assert [steps_to_profile(value) for value in ("true", True, "false", "5", 0)] == [3, 3, 0, 5, 0]
    with pytest.raises(ValueError, match="profile: must be true, false or a number of steps, got 'yes'"):
        ConsistencyLensTrainingArguments(output_dir=str(tmp_path), use_cpu=True, profile="yes")
