"""What the repository shows was measured, and meets what was promised."""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = json.loads((ROOT / "model_cards/tiny_stories/metrics.json").read_text(encoding="utf-8"))
BEST = json.loads((ROOT / "model_cards/best.json").read_text(encoding="utf-8"))
OBJECTIVES = json.loads((ROOT / "model_cards/objectives.json").read_text(encoding="utf-8"))
RESULTS = ROOT / "tests" / "benchmarks" / "results"


def test_the_demo_is_readable_and_faithful():
    assert METRICS["fve"] >= 0.60
    assert METRICS["kl_recovered"] >= 0.80
    assert METRICS["perplexity_ratio"] <= 1.5
    assert METRICS["private_code"]["fresh_encoder"]["share_of_fve"] >= 0.6
    assert METRICS["controls"]["shuffled"]["fve"] < 0
    assert METRICS["arguments"]["recipe"]["num_text_tokens"] <= 12


def test_the_readme_shows_the_figures_of_that_run():
    block = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for name in ("fve", "kl_recovered", "perplexity_ratio"):
        assert f"| {METRICS[name]:.3f} |" in block or f"| {METRICS[name]:.2f} |" in block
    for control in METRICS["controls"].values():
        assert f"| {control['fve']:.3f} | {control['kl_recovered']:.3f} |" in block


def test_the_best_recipe_meets_its_aims_with_every_seed():
    assert len(BEST) >= 3
    for run in BEST.values():
        metrics = run["metrics"]
        assert run["num_text_tokens"] <= 12 and run["seconds"] <= 30 * 60
        assert metrics["fve"] >= 0.75 and metrics["kl_recovered"] >= 0.85 and metrics["perplexity_ratio"] <= 1.5
        assert metrics["controls"]["shuffled"]["fve"] < 0
        assert metrics["private_code"]["fresh_encoder"]["share_of_fve"] >= 0.6


@pytest.mark.parametrize(("name", "runs"), [("best", BEST), ("objectives", OBJECTIVES)])
def test_the_readme_shows_each_run_that_was_compared(name, runs):
    block = README.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
    for label, run in runs.items():
        metrics = run["metrics"]
        figures = f"| {metrics['fve']:.3f} | {metrics['kl_recovered']:.3f} | {metrics['perplexity_ratio']:.2f} |"
        assert f"| {label} {figures}" in block


def test_the_objectives_were_compared_at_like_times():
    minutes = [run["laps"]["training"] / 60 for run in OBJECTIVES.values()]
    assert len(minutes) >= 4 and max(minutes) < 1.35 * min(minutes)


def test_the_tuned_lens_passes_the_gates_that_the_readme_says_it_passes():
    folder = ROOT / "model_cards/tuned_lens_tiny_stories"
    metrics, gates = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "gates"))
    assert all(gates["acceptance"][f"gate_{letter}"] for letter in "ACD")
    block = README.split("<!-- tuned_lens:begin -->")[1].split("<!-- tuned_lens:end -->")[0]
    for layer, nats in enumerate(metrics["kl"]["tuned"]):
        assert re.search(rf"\| {layer} \|.*\| {nats / math.log(2):.3f} \|", block)
    for value in gates["kpis"]["median_delta_kl_bits@{25,50,75}%"]:
        assert f"| {value:.3f} |" in block


def test_the_recipe_for_short_prompts_passes_those_gates_with_every_seed():
    runs = json.loads((ROOT / "model_cards/tuned_lens_short_prompts.json").read_text())["runs"]
    assert len({run["seed"] for run in runs}) >= 2
    for run in runs:
        for suite in ("stories", "default"):
            assert all(run["suites"][suite]["acceptance"][f"gate_{letter}"] for letter in "ACD")


def test_every_picture_of_the_readme_exists():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("kl_one_token", 2.0),
        ("kl_multi_position", 2.0),
        ("kl_context_attention", 1.0),
        ("encoder_cut", 1.0),
        ("straight_through_time", 1.5),
        ("straight_through_memory", 1.0),
        ("logits_in_chunks_flops", 0.9),
        ("logits_in_chunks_flops_tiny_stories", 0.9),
        ("logits_in_chunks_memory", 1.5),
        ("shared_weights_memory", 1.0),
        ("step_flops_vs_reference", 5.0),
        ("step_flops_vs_reference_k8", 8.0),
        ("step_flops_vs_reference_last", 3.5),
        ("step_flops_vs_reference_tiny_stories", 5.0),
        ("step_flops_vs_reference_k8_tiny_stories", 8.0),
        ("step_flops_vs_reference_last_tiny_stories", 3.5),
        ("table_product", 1.0),
        ("step_vs_reference", 5.0),
        ("step_vs_reference_tiny_stories", 5.0),
        ("step_vs_reference_k8", 8.0),
        ("step_vs_reference_k8_tiny_stories", 8.0),
        ("step_vs_reference_larger_batch", 5.0),
        ("step_vs_reference_larger_batch_tiny_stories", 5.0),
        ("step_vs_reference_larger_batch_k8", 8.0),
        ("step_vs_reference_larger_batch_k8_tiny_stories", 8.0),
        ("step_memory_vs_reference", 1 / 0.45),
        ("step_memory_vs_reference_tiny_stories", 1 / 0.45),
        ("step_memory_vs_reference_k8", 1 / 0.45),
        ("step_memory_vs_reference_k8_tiny_stories", 1 / 0.45),
        ("step_memory_of_larger_batch", 1 / 0.45),
        ("step_memory_of_larger_batch_tiny_stories", 1 / 0.45),
        ("step_memory_of_larger_batch_k8", 1.0),
        ("step_memory_of_larger_batch_k8_tiny_stories", 1.0),
        ("explain_batched", 10.0),
        ("explain_vs_generate", 1.0),
        ("cache_vs_plain_loop", 3.0),
        ("cache_vs_plain_loop_k1", 1.0),
        ("cache_vs_bare_forward", 1 / 1.3),
        ("step_bytes_on_paper_1b", 1.0),
        ("step_bytes_on_paper_1b_policy_gradient", 1.0),
        ("step_bytes_on_paper_7b", 1.0),
        ("step_bytes_on_paper_7b_policy_gradient", 1.0),
        ("step_flops_on_paper_1b", 0.9),
        ("step_flops_on_paper_7b", 0.9),
        ("step_flops_vs_reference_on_paper_1b", 8.0),
        ("step_flops_vs_reference_on_paper_7b", 8.0),
        ("tuned_lens_time_to_peer_kl", 10.0),
        ("tuned_lens_kl_equal_tokens", 1 / 0.85),
        ("tuned_lens_memory", 1.0),
    ],
)
def test_a_benchmark_result_is_whole_and_meets_its_aim(name, least):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert result.keys() >= {"name", "what", "unit", "ours", "theirs", "ratio", "runs", "machine", "versions"}
    assert result["name"] == name
    assert result["ratio"] == pytest.approx(result["theirs"] / result["ours"], rel=1e-3)
    assert result["ratio"] >= least


@pytest.mark.parametrize("name", ["kl_share_of_step", "kl_share_of_step_tiny_stories"])
def test_the_kl_costs_at_most_fifteen_percent_of_a_step(name):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert result["unit"] == "of a step" and 0 < result["ours"] <= 0.15


def test_a_report_of_ten_thousand_tokens_opens_within_three_seconds_and_scrolls_smoothly():
    result = json.loads((RESULTS / "report_page.json").read_text(encoding="utf-8"))
    assert result["tokens_that_are_elements_after_scrolling"] == 10_000
    assert result["opened"]["longest"] < 3000
    frames = result["frames_while_scrolling"]
    assert frames["count"] > 1000 and frames["median"] < 17 and frames["p95"] < 34
