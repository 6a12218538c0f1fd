"""The scripts that measure steps and caches on GPUs, by a tiny model on the CPU."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"
SHORT = ["--modes", "eager", "--steps", "2", "--warmup", "2"]
BESIDE_MODELS = ("projection", "output_map", "decoder_prompt", "encoder_prompt")


@pytest.fixture
def gpu_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_step

    return gpu_step


@pytest.fixture
def tiny(gpu_step):
    import gpu_shapes

    return gpu_shapes.TINY


def result(name="gpu_step_7b_gumbel_compile_ddp_8", device="NVIDIA H200", **others):
    settings = {
        "shape": "7b", "objective": "gumbel", "mode": "compile", "strategy": "ddp", "processes": 8, "batch": 192,
        "S": 256, "T": 16, "K": 8, "clones": "lora",
    }  # fmt: skip
    return {
        "name": name, "settings": settings, "seconds": 0.5, "activations_per_second": 3072.0,
        "peak_memory_bytes": 70_000_000_000, "useful_flops": 2e14, "mfu": 0.4044,
        "machine": {"device": device}, "versions": {"torch": "2.13.0"}, **others,
    }  # fmt: skip


def test_without_a_gpu_it_says_so_and_writes_nothing(gpu_step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_step, "write", None)
    assert gpu_step.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_step: there is no GPU here; --tiny FOLDER tries the script itself on a tiny model"
    ]


def test_too_few_steps_before_those_that_count_are_refused(gpu_step, capsys):
    with pytest.raises(SystemExit):
        gpu_step.main(["--warmup", "1"])
    assert "--warmup: the first step is not like the others; got 1, give 2 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_every_objective_is_timed_counted_and_written(gpu_step, tmp_path, capsys):
    assert gpu_step.main(["--tiny", str(tmp_path), *SHORT]) == 0
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*.json"))]
    assert [result["settings"]["objective"] for result in results] == ["gumbel", "policy_gradient", "warm_start"]
    for result in results:
        assert len(result["all_seconds"]) == 2 and result["seconds"] > 0 and result["mfu"] is None
        assert result["settings"]["clones"] == "lora" and result["settings"]["strategy"] == "1 process"
        assert result["useful_flops"] > 0 and ("plan" in result) == (result["settings"]["objective"] == "gumbel")
    page = (tmp_path / "gpu.md").read_text()
    assert results[0]["machine"]["device"] in page and page.count("| 1 process |") == 3


def test_the_plan_s_step_runs_in_turn_with_ours(gpu_step, tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_step, "clones_here", lambda: "frozen")
    turns = []
    step, end = gpu_step.Opponent.step, gpu_step.Rounds.on_step_end

    def ours(rounds, args, state, control, **kwargs):
        turns.append("ours")
        end(rounds, args, state, control, **kwargs)

    monkeypatch.setattr(gpu_step.Opponent, "step", lambda opponent: (turns.append("plan"), step(opponent)))
    monkeypatch.setattr(gpu_step.Rounds, "on_step_end", ours)
    assert gpu_step.main(["--tiny", str(tmp_path), *SHORT, "--objectives", "gumbel"]) == 0
    assert "PEFT is not installed, so the clones are frozen" in capsys.readouterr().out
    # two steps before, another of the plan's that is not timed, and then one after the other
    assert turns == ["ours", "ours", "plan", "ours", "plan", "ours", "plan"]
    (written,) = (json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json"))
    assert written["plan"]["batch"] == written["settings"]["batch"] == tiny.batch
    per_activation = written["seconds"] / tiny.batch
    assert written["plan"]["ratio"] == pytest.approx(1 / written["plan"]["activations_per_second"] / per_activation)


def test_the_plan_s_batch_is_halved_until_it_fits(gpu_step, tiny, monkeypatch):
    sizes = []

    def step(opponent):
        sizes.append(opponent.batch)
        if opponent.batch > 4:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_step.Opponent, "step", step)
    lens = tiny.make_lens("cpu")
    opponent = gpu_step.Opponent(lens, tiny.make_source(lens, 32), tiny, 22, "lora")
    assert sizes == [22, 10, 4] and opponent.batch == 4  # whole sequences, K=2
    opponent.measure()
    assert len(opponent.all_seconds) == 1
    monkeypatch.setattr(gpu_step.Opponent, "fits", lambda opponent: False)
    never = gpu_step.Opponent(lens, tiny.make_source(lens, 32), tiny, 22, "lora")
    never.measure()
    assert never.batch == 0 and never.all_seconds == []


def test_the_plan_with_adapters_trains_them_alone(gpu_step, tiny):
    lens = tiny.make_lens("cpu")
    opponent = gpu_step.Opponent(lens, tiny.make_source(lens, 8), tiny, 4, "lora")
    trained = {name for name, parameter in opponent.plan.named_parameters() if parameter.requires_grad}
    assert any("decoder" in name for name in trained) and any("encoder" in name for name in trained)
    assert all(".lora_" in name or name.startswith(BESIDE_MODELS) for name in trained)
    assert len({id(model.get_input_embeddings().weight) for model in (
        opponent.plan.original, opponent.plan.decoder, opponent.plan.encoder, lens.subject.model
    )}) == 4  # fmt: skip


def test_a_result_is_a_line_of_the_page(gpu_step):
    import gpu_page

    line = "| 7b | gumbel | compile | ddp | 8 | 192 | 0.5 | 3,072 | 70.0 | 200 | 40.4% |  |  |  |"
    assert gpu_page.row_of(result()) == line
    plan = {"batch": 24, "activations_per_second": 300.4, "peak_memory_bytes": 1, "ratio": 10.2345}
    assert gpu_page.row_of(result(plan=plan)).endswith("| 40.4% | 24 | 300 | 10.23 |")
    cached = {"name": "cache_7b", "what": "a cache", "ours": 36.12, "theirs": 30.0, "ratio": 0.8306}
    cached |= {"machine": {"device": "NVIDIA H200"}, "versions": {"torch": "2.13.0"}}
    assert gpu_page.row_of(cached) == "| `cache_7b` | a cache | 36.1 | 30 | 0.83 |"
    page = gpu_page.document([result(), cached, result(device="NVIDIA A100", mfu=None)])
    assert page.count("\n## ") == 2 and page.count(line) == 1 and "| not known |" in page
    assert page.index("`cache_7b`") < page.index("NVIDIA A100")


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Another", None)],
)
def test_the_peak_is_that_of_the_device(gpu_step, monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_step.peak_of(torch.device("cuda")) == peak


def test_a_cache_of_a_shape_is_built_and_compared(gpu_step, tiny, monkeypatch, tmp_path):
    import cache_vs_bare_forward as caching

    monkeypatch.setattr("harness.RESULTS", tmp_path)
    monkeypatch.setattr(caching, "RESULTS", tmp_path)
    monkeypatch.setattr(caching, "PAGE", tmp_path / "gpu.md")
    monkeypatch.setattr(caching, "POSITIONS", tiny.positions)
    monkeypatch.setattr(caching, "write_page", lambda results, page, newest: written.append(newest))
    written = []
    caching.measure_shape(tiny, torch.device("cpu"))
    (newest,) = written
    assert newest["name"] == "cache_vs_bare_forward_tiny" and newest["ratio"] == newest["theirs"] / newest["ours"]
    assert "cache of 16 activations, tiny shape, K=2" in newest["what"] and "2 of 3 blocks" in newest["what"]
