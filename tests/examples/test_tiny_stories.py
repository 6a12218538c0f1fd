"""The embedded model, its recipe and the commands of the README, as they are written."""

import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from consistency_lens import ConsistencyLensModel, Subject, TunedLens
from consistency_lens.cli.main import main as command_line
from consistency_lens.cli.parser import RECIPE_SECTIONS, parse_arguments
from consistency_lens.cli.train import main
from consistency_lens.data.generation import sample_documents
from consistency_lens.evaluation.metrics import text_nll
from consistency_lens.losses import kl_divergence
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.recipe_arguments import RecipeArguments
from consistency_lens.tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_stories"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def story_model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def run_commands(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the lines of a block one after the other, in this process, which has imported everything already."""
    monkeypatch.chdir(ROOT)
    activate, *lines = block.replace("\\\n", " ").splitlines()
    assert activate == ". .venv/bin/activate"
    for line in lines:
        words = shlex.split(line)
        if words[0] == "consistency-lens":
            assert command_line(words[1:]) == 0, line
        else:
            assert words[:2] == ["accelerate", "launch"]
            monkeypatch.setattr(sys, "argv", words[2:])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(words[2], run_name="__main__")
            assert end.value.code == 0, line


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_embedded_model_is_small_and_safe():
    assert sum(path.stat().st_size for path in MODEL.iterdir() if path.is_file()) < 8e6
    assert {path.suffix for path in MODEL.iterdir() if path.is_file()} <= {".safetensors", ".json", ".md", ".py"}


def test_the_embedded_model_writes_stories_that_it_finds_likely(story_model):
    model, tokenizer = story_model
    corpus = sample_documents(model, tokenizer, 8, 64, seed=0, progress=False)
    assert all(row[0] == tokenizer.bos_token_id for row in corpus["input_ids"])
    story = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt").input_ids
    shuffled = story[:, torch.randperm(story.shape[1], generator=torch.Generator().manual_seed(0))]
    subject = Subject(model, layer=2)
    assert text_nll(subject, story).mean() < 2.0 < text_nll(subject, shuffled).mean()


def test_a_pretrained_model_by_others_reads_the_same_by_one_token_and_in_full(stories260k):
    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    ids = tokenizer("Once upon a time, there was a little dog who liked to play.", return_tensors="pt").input_ids
    subject, positions = Subject(model, layer=3), torch.tensor([[5, 9]])
    context = subject.context(ids, torch.ones_like(ids), positions)
    assert context.cache is not None  # the cheap pass is in use
    wrong = context.activations.flip(1)
    fast = kl_divergence(context.logits, subject.replaced_logits(context, wrong))
    full = kl_divergence(context.logits, subject.replaced_logits_full(context, wrong))
    torch.testing.assert_close(fast, full, atol=1e-5, rtol=1e-4)
    assert full.min() > 0.1


def random_subject(family: str, folder: Path) -> Path:
    """A model of four blocks with random weights, and its tokenizer."""
    layer_types = {"layer_types": None} if family == "gemma3" else {}
    tiny_model(family, num_hidden_layers=4, **layer_types).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "gemma2")]


@pytest.mark.parametrize("subject", ["stories260k", "gemma3", *OTHERS])
def test_the_best_recipe_needs_no_change_but_the_model(subject, tmp_path, request):
    folder = request.getfixturevalue(subject) if subject == "stories260k" else random_subject(subject, tmp_path / "m")
    small = {
        "num_documents": 16, "positions_per_sequence": 4, "max_steps": 4, "eval_rows": 8, "max_length": 32,
        "validation_fraction": 0.3, "per_device_train_batch_size": 4, "num_samples": 2, "logging_steps": 2,
        "eval_steps": 3, "interim_eval_rows": 4, "sample_steps": 3, "tracked_samples": 2, "disable_tqdm": True,
        "model": folder, "output_dir": tmp_path / "run", "use_cpu": True,
    }  # fmt: skip
    flags = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    shorter = ["--stages", "warm_start 2s", "policy_gradient", "--eval_checks", "best_of_n", "steering"]
    assert main(["--config", str(ROOT / "examples/recipes/tiny_stories_best.yaml"), *flags, *shorter]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    # of 16 documents it is not sure how many begin in a way of their own
    assert 2 <= metrics["rows"] <= 8 and metrics["controls"]["mean"]["fve"] == pytest.approx(0, abs=1e-6)


RECIPES = ROOT / "examples" / "recipes"
TUNED_LENS_RECIPES = sorted((RECIPES / "tuned_lens").glob("*.yaml"))


@pytest.mark.parametrize("path", TUNED_LENS_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_tuned_lens_has_known_keys(path):
    settings = {"model": "examples/tiny_stories"} | yaml.safe_load(path.read_text())
    arguments = ["--config", str(path), "--model", settings["model"], "--use_cpu", "true"]
    fit, training = parse_arguments((FitArguments, TunedLensTrainingArguments), arguments)
    assert (fit.tokens, training.learning_rate) == (settings["tokens"], settings["learning_rate"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_has_known_keys_and_stages_that_fit(path):
    classes = (RecipeArguments, ConsistencyLensTrainingArguments)
    arguments = ["--config", str(path), "--use_cpu", "true"]
    recipe, training = parse_arguments(classes, arguments, sections=RECIPE_SECTIONS)
    assert recipe.model == yaml.safe_load(path.read_text())["model"]
    epochs = round(100 * training.num_train_epochs)
    training.stage_starts(steps_per_epoch=100, total_steps=training.max_steps if training.max_steps > 0 else epochs)


def test_the_python_of_the_readme_runs_as_written(tmp_path, story_model, monkeypatch):
    model, tokenizer = story_model
    lens = ConsistencyLensModel.from_subject(model, tokenizer, layer=2, training="frozen")
    lens.save_pretrained(tmp_path / "lens")
    TunedLens.for_model(model, tokenizer, rank=4).save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(ROOT)
    code = blocks("python")
    assert len(code) >= 3 and "outputs/tiny_stories" in code[0]
    for block in code:
        script = block.replace("outputs/tiny_stories", str(tmp_path / "lens"))
        script = script.replace("outputs/tuned_lenses/tiny_stories", str(tmp_path / "tuned"))
        assert "consistency_lens" in script  # or `AutoModel` would not know the lens
        exec(compile(script, "README.md", "exec"), {})


def test_the_way_from_text_to_a_lens_in_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    block = next(block for block in blocks("bash") if "consistency-lens tokenize" in block)
    animals, places = ("dog", "cat", "bird", "bear", "fish"), ("park", "house", "tree", "sea", "shop", "hill")
    stories = [f"Once upon a time, a little {a} went to the {p}. The {a} was happy." for a in animals for p in places]
    (tmp_path / "corpus.txt").write_text("\n<|endoftext|>\n".join(stories))
    small = (
        "--max_steps 2 --stages 'warm_start 1s' policy_gradient --per_device_train_batch_size 4 --interim_eval_rows 2 "
        "--eval_rows 4 --eval_checks best_of_n --num_samples 1 --sample_steps 0"
    )
    replacements = {
        "corpus.txt": str(tmp_path / "corpus.txt"),
        "data/": f"{tmp_path}/data/",
        "outputs/own": f"{tmp_path}/own {small}",
    }
    for written, small_one in replacements.items():
        assert written in block
        block = block.replace(written, small_one)
    run_commands(block, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("layer_2") >= 2 and "FVE" in printed
    assert (tmp_path / "own" / "model.safetensors").is_file() and not (tmp_path / "own" / "data").exists()


def test_the_way_to_a_tuned_lens_in_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    block = next(block for block in blocks("bash") if "tuned-lens fit" in block)
    words = itertools.product(("dog", "cat", "bird", "bear", "fish"), ("park", "house", "sea"), range(20))
    stories = [f"Once upon a time, a little {a} went to the {b}. It saw {n} trees and was happy." for a, b, n in words]
    (tmp_path / "corpus.txt").write_text("\n<|endoftext|>\n".join(stories))
    small = (
        f"--dataset {tmp_path}/corpus.txt --tokens 4096 --validation_tokens 128 --seq_len 32 "
        f"--validation_fraction 0.1 --output_dir {tmp_path}/lens"
    )
    replacements = {
        "tuned_lens/tiny_stories.yaml": f"tuned_lens/tiny_stories.yaml {small}",
        "outputs/tuned_lenses/tiny_stories": f"{tmp_path}/lens",
        "outputs/sweep": f"{tmp_path}/sweep",
        "--gates A C D": "--gates C",  # so little text does not make a lens
    }
    for written, small_one in replacements.items():
        assert written in block
        block = block.replace(written, small_one)
    run_commands(block, monkeypatch)
    printed = capsys.readouterr().out
    for expected in ("The lens lies in", "passed: C", "sweep-overview.png"):
        assert expected in printed
    assert (tmp_path / "lens" / "provenance.json").is_file() and (tmp_path / "sweep" / "sweep.json").is_file()


def test_the_command_of_the_readme_trains_a_lens(tmp_path):
    assert "`accelerate launch examples/train_lens.py --config examples/recipes/tiny_stories.yaml`" in README
    small = {
        "num_documents": 20, "max_length": 32, "positions_per_sequence": 4, "max_steps": 4, "eval_rows": 8,
        "validation_fraction": 0.3, "per_device_train_batch_size": 4, "num_samples": 2, "logging_steps": 2,
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    flags = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    recipe = ["examples/train_lens.py", "--config", "examples/recipes/tiny_stories.yaml"]
    stages = ["--stages", "warm_start 2s", "policy_gradient", "--eval_checks", "best_of_n"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, *recipe, *flags, *stages], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in ("FVE", "context_tail", "next before", "The lens lies in"):
        assert expected in done.stdout
