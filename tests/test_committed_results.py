"""What the repository shows was measured, and meets what was promised."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = json.loads((ROOT / "model_cards/tiny_stories/metrics.json").read_text(encoding="utf-8"))
RESULTS = ROOT / "tests" / "benchmarks" / "results"


def test_the_demo_is_readable_and_faithful():
    assert METRICS["fve"] >= 0.40
    assert METRICS["kl_recovered"] >= 0.40
    assert METRICS["perplexity_ratio"] <= 2.5
    assert METRICS["controls"]["shuffled"]["fve"] < 0
    assert METRICS["arguments"]["recipe"]["num_text_tokens"] <= 12


def test_the_readme_shows_the_figures_of_that_run():
    block = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for name in ("fve", "kl_recovered", "perplexity_ratio"):
        assert f"| {METRICS[name]:.3f} |" in block or f"| {METRICS[name]:.2f} |" in block
    for control in METRICS["controls"].values():
        assert f"| {control['fve']:.3f} | {control['kl_recovered']:.3f} |" in block


def test_every_picture_of_the_readme_exists():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("kl_one_token", 2.0),
        ("kl_multi_position", 2.0),
        ("encoder_cut", 1.0),
        ("straight_through_time", 1.5),
        ("straight_through_memory", 1.0),
        ("shared_weights_memory", 1.0),
    ],
)
def test_a_benchmark_result_is_whole_and_meets_its_aim(name, least):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert result.keys() >= {"name", "what", "unit", "ours", "theirs", "ratio", "runs", "machine", "versions"}
    assert result["name"] == name
    assert result["ratio"] == pytest.approx(result["theirs"] / result["ours"], rel=1e-3)
    assert result["ratio"] >= least
