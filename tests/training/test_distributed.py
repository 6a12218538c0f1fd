"""Real jobs of two gloo processes: each strategy trains the same lens, really spreads it, and goes on where it was."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from distributed_runs import (
    GLOBAL_BATCH,
    ONE_STAGE,
    STAGES,
    Run,
    keep_controlled,
    keep_gradients,
    run_all,
    run_everything,
)
from gloo_processes import on_two_processes
from lens_runs import tiny_trainer
from safetensors.torch import load_file
from test_controlled_trainer import FULL, late_groups
from test_trainer import LORA
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModel

from consistency_lens.training.parameter_groups import group_of

FROZEN = {"training": "frozen"}
SHORT = {"max_steps": 6, "stages": ["warm_start 2s", "gumbel 2s", "policy_gradient"]}
SAVED = {"save_strategy": "steps", "save_steps": 9, "eval_strategy": "steps", "eval_steps": 9}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def torchrun(script: Path, arguments: list[str]) -> None:
    """Starts a script on two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-5000:]


def launch(folder: Path, runs: list[Run]) -> None:
    """Has two processes do the runs one after the other."""
    on_two_processes(run_all, folder, json.dumps([asdict(run) for run in runs]))


def alone(folder: Path, name: str, clones: dict, **arguments) -> None:
    """The same run on one process, this one."""
    settings = STAGES | {"output_dir": str(folder / name), "per_device_train_batch_size": GLOBAL_BATCH} | arguments
    trainer = tiny_trainer(folder / f"{name}.0", clones, **settings)
    trainer.train()
    trainer.save_model()
    (folder / name / "log.json").write_text(json.dumps({"log": trainer.state.log_history, "moved": []}))


def log(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name / "log.json").read_text())["log"]


def column(folder: Path, name: str, key: str = "loss") -> list[float]:
    return [entry[key] for entry in log(folder, name) if key in entry]


def sizes(folder: Path, name: str) -> list[dict[str, int]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


def check_agreement(folder: Path, name: str, reference: str) -> None:
    """The same losses, norms of gradients and rates in every step, and the same lens at the end, whole."""
    assert column(folder, name) == pytest.approx(column(folder, reference), abs=1e-5)
    assert column(folder, name, "grad_norm") == pytest.approx(column(folder, reference, "grad_norm"), rel=1e-4)
    # though the processes have read unlike numbers of each kind of text
    for part in ("mse_true_text", "mse_own_text"):
        assert column(folder, name, part) == pytest.approx(column(folder, reference, part), abs=1e-4)
    for group in ("decoder_projections", "encoder_projections"):
        rates = column(folder, name, f"learning_rate_{group}")
        assert rates == pytest.approx(column(folder, reference, f"learning_rate_{group}"))
    saved, expected = (load_file(folder / run / "model.safetensors") for run in (name, reference))
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.shape == saved[key].shape
        assert float((tensor - saved[key]).abs().max()) < 1e-4, key


def check_spread(folder: Path, name: str, whole: str, models: tuple[str, ...]) -> None:
    """Each process holds about half of the optimizer's moments and of `models`; `whole` shares no tensors."""
    for found, expected in zip(sizes(folder, name), sizes(folder, whole), strict=True):
        assert found["left_whole"] == 0
        for what in ("moments", *models):
            assert 0.45 < found[what] / expected[what] < 0.55, what


def check_resumed(folder: Path, name: str, whole: str) -> None:
    """A run that went on from a checkpoint had the losses of the undisturbed one, and came to the same lens."""
    assert column(folder, name) == pytest.approx(column(folder, whole), abs=1e-6)
    resumed, undisturbed = (load_file(folder / run / "model.safetensors") for run in (name, whole))
    assert all(float((resumed[key] - tensor).abs().max()) < 1e-6 for key, tensor in undisturbed.items())


def check_skipped(folder: Path, name: str) -> None:
    """The poisoned step moved nothing and was counted; the one after it did, at the rate of its own step."""
    assert column(folder, name, "skipped_steps") == [0, 1, 1]
    still, moved = json.loads((folder / name / "log.json").read_text())["moved"]
    assert still == 0 and moved > 1e-5
    assert column(folder, name, "learning_rate") == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def runs_of(strategy: str, clones: dict, **arguments) -> list[Run]:
    """A run that is watched and saves, one that goes on from its middle, and one with a step to be skipped."""
    poisoned = {"max_steps": 3, "stages": ["warm_start"]}
    return [
        Run(strategy, strategy, clones, arguments | SAVED, watched=True),
        Run(f"{strategy}_resumed", strategy, clones, arguments, resumed=(strategy, "checkpoint-9")),
        Run(f"{strategy}_skips", strategy, clones, poisoned, poisoned_step=1),
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all that two processes did."""
    folder = tmp_path_factory.mktemp("two")
    watched = runs_of("fsdp2", LORA)[0]
    runs = [Run("ddp", "ddp", LORA, {"share_weights": "false"}), watched]
    if HAS_DEEPSPEED:
        runs.append(Run("zero3", "zero3", LORA, SHORT))
    on_two_processes(run_everything, folder, json.dumps([asdict(run) for run in runs]))
    return folder


def test_two_processes_give_the_gradients_of_one(two):
    keep_gradients(two)
    for name in ONE_STAGE:
        one, of_two = (load_file(two / f"{name}{processes}.safetensors") for processes in (1, 2))
        assert one.keys() == of_two.keys() and len(one) > 20
        for key, gradient in one.items():
            torch.testing.assert_close(of_two[key], gradient, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")


def test_two_processes_unfreeze_clip_and_average_as_one_does(two):
    keep_controlled(two)
    for clones in (FULL, LORA):
        one, of_two = (load_file(two / f"{clones['training']}{processes}.safetensors") for processes in (1, 2))
        assert one.keys() == of_two.keys() and len(one) > 20
        for name, tensor in one.items():
            torch.testing.assert_close(of_two[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
        kind = f"decoder_{late_groups(clones)[0]}"
        late = [key.partition(".")[2] for key in of_two if key.startswith("0.") and group_of(key) == kind]
        assert late and all(torch.equal(of_two[f"0.{name}"], of_two[f"2.{name}"]) for name in late)
        assert any(not torch.equal(of_two[f"2.{name}"], of_two[f"3.{name}"]) for name in late)


def test_strategies_train_the_lens_of_one_process(two):
    alone(two, "one", LORA)
    alone(two, "one_short", LORA, **SHORT)
    check_agreement(two, "ddp", "one")
    check_agreement(two, "fsdp2", "one")
    check_spread(two, "fsdp2", "ddp", ("lens", "subject", "reference"))
    assert len(column(two, "fsdp2", "eval_fve")) == 2  # at a checkpoint and at the end
    assert len((two / "fsdp2" / "sample_tables.jsonl").read_text().splitlines()) == 8
    assert not {path.suffix for path in (two / "fsdp2").rglob("*.*")} & {".pt", ".bin", ".pkl", ".distcp"}
    AutoModel.from_pretrained(two / "fsdp2", base_model=subject_of(two))
    if HAS_DEEPSPEED:
        check_agreement(two, "zero3", "one_short")
        check_spread(two, "zero3", "ddp", ("lens", "subject", "reference"))


def subject_of(folder: Path):
    """The subject of all these runs, whole."""
    return tiny_trainer(folder / "subject", FROZEN, output_dir=str(folder / "subject" / "run")).lens.subject.model


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("clones", [FULL, LORA, FROZEN], ids=lambda clones: clones["training"])
def test_every_strategy_trains_resumes_and_skips(tmp_path, clones):
    alone(tmp_path, "one", clones)
    strategies = ("ddp", "fsdp2", "zero2", "zero3")
    runs = [run for strategy in strategies[1:] for run in runs_of(strategy, clones)]
    launch(tmp_path, [*runs_of("ddp", clones, share_weights="false"), *runs])
    for strategy in strategies:
        check_agreement(tmp_path, strategy, "one")
        check_resumed(tmp_path, f"{strategy}_resumed", strategy)
        check_skipped(tmp_path, f"{strategy}_skips")
        models = ("lens", "subject", "reference") if strategy in ("fsdp2", "zero3") else ()
        if strategy != "ddp":
            check_spread(tmp_path, strategy, "ddp", models)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_weights_and_moments_may_lie_in_the_memory_of_the_cpu(tmp_path):
    alone(tmp_path, "one", LORA, **SHORT)
    launch(tmp_path, [Run("zero3_offload", "zero3_offload", LORA, SHORT)])
    check_agreement(tmp_path, "zero3_offload", "one")


PROMPTS = {"decoder_prompt": "w3 w5 w6 <embed> w4", "encoder_prompt": "w5 <text>", "injection_layers": 1}
# name -> clones, arguments on one process, what the two processes have beside them
CASES = {
    "checkpointing": (LORA, {"gradient_checkpointing": True}, {}),
    "accumulation": (LORA, {}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "prompts": ({**FULL, **PROMPTS}, {}, {}),
    "limits": (LORA, {"group_max_grad_norm": {"encoder_lora": 0.1}}, {}),
    "rewards": (LORA, {"reward": "-kl", "lm_reference": "subject", "delta_residual": "full"}, {}),
    # 8 rows on one process and 4 on each of two, none of which it divides
    "chunks": (FULL, {"logits_chunk_size": 3, "own_share": 0.5}, {}),
    "judged_in_chunks": (LORA, {"logits_chunk_size": 3, "reward": "-kl", "lm_reference": "subject"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_spread_weights_go_with_other_settings(tmp_path, strategy):
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    # DeepSpeed clips by itself, for all groups at once
    cases = {name: case for name, case in CASES.items() if strategy == "fsdp2" or name != "limits"}
    for name, (clones, arguments, _) in cases.items():
        alone(tmp_path, f"{name}_alone", clones, **SHORT, **arguments)
    launch(
        tmp_path,
        [Run(name, strategy, clones, SHORT | both | two) for name, (clones, both, two) in cases.items()]
        + [Run("on_the_fly", strategy, LORA, SHORT, source="on_the_fly")],
    )
    for name in cases:
        check_agreement(tmp_path, name, f"{name}_alone")
    alone(tmp_path, "cached", LORA, **SHORT)
    check_agreement(tmp_path, "on_the_fly", "cached")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_a_recipe_ends_with_its_figures(tmp_path, strategy):
    if strategy != "fsdp2":
        pytest.importorskip("deepspeed")
    tiny_model("llama").save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    documents = (" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    settings = {
        "model": tmp_path / "subject", "layer": 1, "num_text_tokens": 3, "min_position": 4, "max_length": 16,
        "dataset": tmp_path / "text.txt", "positions_per_sequence": 3, "validation_fraction": 0.3, "clones": "lora",
        "activations": "on_the_fly", "eval_rows": 16, "num_samples": 2, "max_steps": 4, "sample_steps": 2,
        "per_device_train_batch_size": 4, "output_dir": tmp_path / "run", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    torchrun(Path(__file__).with_name("recipe_under.py"), [strategy, str(tmp_path), *flags])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"] == 16 and "untrained" in metrics["controls"]
    lens = AutoModel.from_pretrained(tmp_path / "run")
    assert len(lens.explain("w4 w5 w6 w7 w8").tokens) == 5
