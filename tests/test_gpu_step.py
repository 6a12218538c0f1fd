"""The script that measures a training step on GPUs, by a tiny model on the CPU."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"
SHORT = ["--modes", "eager", "--steps", "2", "--warmup", "1", "--batch", "4"]


@pytest.fixture
def gpu_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_step

    return gpu_step


def numbers_of_blocks(sizes, blocks):
    """Entries of the matrices of the first blocks."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    return blocks * (2 * width * width + 2 * width * keys + 3 * width * inner)


def test_without_a_gpu_it_says_so_and_writes_nothing(gpu_step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_step, "write", None)
    assert gpu_step.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_step: there is no GPU here; --tiny FOLDER tries the script itself on a tiny model"
    ]


@pytest.mark.slow
def test_every_objective_is_timed_counted_and_written(gpu_step, tmp_path, capsys):
    assert gpu_step.main(["--tiny", str(tmp_path), *SHORT]) == 0
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*.json"))]
    assert [result["settings"]["objective"] for result in results] == ["gumbel", "policy_gradient", "warm_start"]
    for result in results:
        assert result["runs"] == 2 and result["seconds"] > 0 and result["mfu"] is None
        assert result["settings"]["clones"] == "lora" and result["settings"]["strategy"] == "1 process"
    page = (tmp_path / "gpu.md").read_text()
    assert results[0]["machine"]["device"] in page and page.count("| 1 process |") == 3


def test_the_products_that_are_counted_are_those_of_the_passes(gpu_step, monkeypatch, tmp_path, capsys):
    """2 N for a token forward, and as much backward through frozen weights."""
    monkeypatch.setattr(gpu_step, "clones_here", lambda: "frozen")
    assert gpu_step.main(["--tiny", str(tmp_path), *SHORT, "--objectives", "policy_gradient"]) == 0
    assert "PEFT is not installed, so the clones are frozen" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json"))
    sizes, length = result["settings"]["subject"], result["settings"]["T"]
    texts, layer = 4 * 4, sizes["num_hidden_layers"] // 2
    whole, cut = numbers_of_blocks(sizes, sizes["num_hidden_layers"]), numbers_of_blocks(sizes, layer + 1)
    head = sizes["hidden_size"] * sizes["vocab_size"]
    prompt = 1  # BOS
    scored = 2 * (whole * (prompt + length) + head * length) * 2
    read = 2 * cut * (prompt + length) * 2
    rollout = reference = 2 * (whole + head) * length
    straight_through = 2 * head * length
    expected = texts * (scored + read + rollout + reference + straight_through)
    assert result["flops"] == pytest.approx(expected, rel=0.35)


def test_mfu_and_table_follow_from_a_result(gpu_step):
    assert gpu_step.PEAKS["NVIDIA H200"] == 989e12
    result = {
        "settings": {"objective": "gumbel", "mode": "compile", "strategy": "ddp", "processes": 8},
        "seconds": 0.5, "texts_per_second": 1024.0, "tokens_per_second": 16384.0, "peak_memory_bytes": 30_000_000_000,
        "flops": 2e14, "mfu": 0.4044,
    }  # fmt: skip
    assert gpu_step.table_row(result) == "| gumbel | compile | ddp | 8 | 0.5 | 1,024 | 16,384 | 30.0 | 200 | 40.4% |"


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Another", None)],
)
def test_the_peak_is_that_of_the_device(gpu_step, monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_step.peak_of(torch.device("cuda")) == peak


def test_a_compiled_step_is_given_the_count_of_the_eager_one(gpu_step, monkeypatch, tmp_path):
    asked = []

    def result_of(options, objective, mode, flops):
        asked.append((objective, mode, flops))
        return {"flops": 7}

    monkeypatch.setattr(gpu_step, "result_of", result_of)
    monkeypatch.setattr(gpu_step, "write", lambda options, result: None)
    assert gpu_step.main(["--tiny", str(tmp_path), "--objectives", "gumbel", "warm_start"]) == 0
    before = {"eager": None, "compile": 7}
    assert asked == [(name, mode, flops) for name in ("gumbel", "warm_start") for mode, flops in before.items()]
