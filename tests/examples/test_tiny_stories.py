"""The embedded model, its recipes, and the command of the README that trains its lens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from consistency_lens import Subject
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


@pytest.mark.slow
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
