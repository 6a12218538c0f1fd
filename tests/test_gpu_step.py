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


def test_one_process_before_several_gpus_is_refused(gpu_step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert gpu_step.main([]) == 2
    assert "got one process and 4 GPUs; start it by torchrun --nproc_per_node gpu" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert gpu_step.what_is_missing(gpu_step.read_options([])) is None
    with pytest.raises(SystemExit):
        gpu_step.main(["--minutes", "5"])
    assert "--minutes: several processes would not agree" in capsys.readouterr().err


def test_the_cases_that_are_asked_for_first_run_first(gpu_step):
    names = [gpu_step.case_name(*case) for case in gpu_step.cases(gpu_step.read_options([]))]
    assert names[:2] == ["1b_gumbel_eager", "7b_gumbel_eager"]
    assert [name for name in names if "in_place" in name] == ["1b_gumbel_in_place", "7b_gumbel_in_place"]
    assert all("compile" in name for name in names[-6:]) and len(names) == 14
    policy = next(case for case in gpu_step.cases(gpu_step.read_options([])) if "policy" in case[1])
    assert policy[0].activations("policy_gradient") * gpu_step.GROUP_SIZE == policy[0].activations("gumbel")


def test_a_case_that_does_not_fit_keeps_no_other_back(gpu_step, monkeypatch, tmp_path, capsys):
    written = []

    def measure(options, shape, objective, mode):
        if objective == "gumbel":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        return {"name": objective}

    monkeypatch.setattr(gpu_step, "measure", measure)
    monkeypatch.setattr(gpu_step, "write", lambda options, result: written.append(result["name"]))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tiny = ["--tiny", str(tmp_path), "--modes", "eager"]
    assert gpu_step.main(tiny) == 1
    assert written == ["warm_start", "policy_gradient"]
    said = "gpu_step: tiny_gumbel_eager does not fit: CUDA out of memory. Tried to allocate 2 GiB."
    assert said in capsys.readouterr().err.splitlines()
    assert gpu_step.main([*tiny, "--minutes", "0"]) == 1
    assert "tiny_warm_start_eager is left out, 0 minutes are over" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(torch.OutOfMemoryError):
        gpu_step.main(tiny)


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(gpu_step, monkeypatch, tmp_path):
    def measure(*_case):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_step, "measure", measure)
    with pytest.raises(RuntimeError, match="illegal"):
        gpu_step.main(["--tiny", str(tmp_path), "--modes", "eager"])
    assert gpu_step.is_of_memory(RuntimeError("CUDA error: out of memory"))


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


def test_in_place_texts_attend_in_place(gpu_step, monkeypatch, tmp_path):
    from consistency_lens.text_attention import TextPasses

    passes, call = [], TextPasses.__call__
    monkeypatch.setattr(TextPasses, "__call__", lambda *args, **how: passes.append(1) or call(*args, **how))
    options = ["--tiny", str(tmp_path), "--steps", "1", "--warmup", "2", "--objectives", "gumbel", "--alone"]
    for mode, expected in (("eager", False), ("in_place", True)):
        passes.clear()
        assert gpu_step.main([*options, "--modes", mode]) == 0
        assert bool(passes) == expected


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

    line = "| 7b | lora | gumbel | compile | ddp | 8 | 192 | 0.5 | 3,072 | 70.0 | 200 | 40.4% |  |  |  |"
    assert gpu_page.row_of(result()) == line
    plan = {"batch": 24, "activations_per_second": 300.4, "peak_memory_bytes": 1, "ratio": 10.2345}
    assert gpu_page.row_of(result(plan=plan)).endswith("| 40.4% | 24 | 300 | 10.23 |")
    cached = {"name": "cache_7b", "what": "a cache", "ours": 36.12, "theirs": 30.0, "ratio": 0.8306, "unit": "seconds"}
    cached |= {"machine": {"device": "NVIDIA H200"}, "versions": {"torch": "2.13.0"}}
    assert gpu_page.row_of(cached) == "| `cache_7b` | a cache | 36.1 | 30 | 0.83 |"
    of_bytes = cached | {"name": "memory_7b", "unit": "bytes"}
    page = gpu_page.document([result(), cached, of_bytes, result(device="NVIDIA A100", mfu=None)])
    assert page.count("\n## ") == 2 and page.count(line) == 1 and "| not known |" in page
    assert page.index("`cache_7b`") < page.index("NVIDIA A100") and "memory_7b" not in page


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("Another", None),
    ],  # fmt: skip
)
def test_the_peak_is_that_of_the_device(gpu_step, monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_step.peak_of(torch.device("cuda")) == peak


def test_a_cache_of_a_shape_is_built_and_compared(gpu_step, tiny, tmp_path):
    import cache_vs_bare_forward as caching

    caching.measure_shape(tiny, torch.device("cpu"), tmp_path / "results", tmp_path / "gpu.md")
    newest = json.loads((tmp_path / "results/cache_vs_bare_forward_tiny.json").read_text())
    assert newest["ratio"] == newest["theirs"] / newest["ours"]
    assert "cache of 16 activations, tiny shape, K=2" in newest["what"] and "2 of 3 blocks" in newest["what"]
    assert "seconds of a build are the hash of the weights" in newest["what"]
    assert "`cache_vs_bare_forward_tiny`" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("rows_per_shard", [8, 8192])
def test_the_bare_side_reads_the_batches_of_the_build(gpu_step, tiny, monkeypatch, tmp_path, rows_per_shard):
    import cache_vs_bare_forward as caching

    from consistency_lens.subject import Subject

    monkeypatch.setattr(caching, "ROWS_PER_SHARD", rows_per_shard)
    model, read = tiny.make_subject("cpu"), []

    def build(name):
        return caching.build_activation_cache(
            Subject(model, tiny.layer), tiny.make_corpus(12), tmp_path / name, tokenizer=caching.word_tokenizer(),
            subject_name="", dataset_name="", positions_per_sequence=2, min_position=10, batch_size=3,
            rows_per_shard=rows_per_shard, progress=False,
        )  # fmt: skip

    batches = caching.batches_of(build("cache"), 2, 3, torch.device("cpu"))
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2]))
    build("again")
    assert read == [ids.shape for ids, _ in batches]
