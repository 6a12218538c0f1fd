import json

import pytest

from consistency_lens.report.run_folder import FILES, read_run


def test_what_is_missing_is_told(tmp_path):
    (tmp_path / "metrics.json").write_text(
        json.dumps({"fve": 0.5, "arguments": {"recipe": {"model": "m", "layer": 2}}})
    )
    run = read_run(tmp_path)
    assert run.metrics["fve"] == 0.5 and run.recipe == {"model": "m", "layer": 2} and run.training == {}
    assert run.missing == [name for name in FILES if name != "metrics.json"]
    assert len(run.notes) == 4 and "No samples.jsonl, which has sample rows: run consistency-lens eval" in run.notes[0]


def test_samples_and_log(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"fve": 1, "context": "a\u2028b"}\n\n{"fve": 2}\n', encoding="utf-8")
    (tmp_path / "log_history.json").write_text('[{"step": 1}]')
    run = read_run(tmp_path)
    assert [sample["fve"] for sample in run.samples] == [1, 2] and run.log == [{"step": 1}]


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.json", "{"), ("metrics.json", "[]"), ("log_history.json", "[3]"), ("samples.jsonl", "{}\nx\n")],
)
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"run: .*{name}"):
        read_run(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="run: no folder at"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has none of metrics.json, .*; pass the output_dir"):
        read_run(tmp_path)
