"""Every recipe: its keys, the commands of its comment, a dry run and a short run on its architecture cut small."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tiny_lenses import tiny_tokenizer
from tiny_models import GEMMA, tiny_model
from transformers import AutoModelForCausalLM, Gemma3Config

from consistency_lens.cli.main import main
from consistency_lens.cli.parser import RECIPE_SECTIONS, parse_arguments
from consistency_lens.cli.pipeline import read_recipe
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.dry_run import dry_run
from consistency_lens.training.recipe_arguments import RecipeArguments

NUM_BLOCKS = 6
RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
# recipe -> the family of its subject
ARCHITECTURES = {
    "tiny_stories": "llama",
    "tiny_stories_best": "llama",
    "causal_lm": "gpt2",
    "simplestories_5m": "llama",
    "gpt2_openwebtext": "gpt2",
    "llama2_7b_8xh100": "llama",
    "gemma3_27b_chat": "gemma3_with_images",
}
TOKENISED = [name for name in ARCHITECTURES if "consistency-lens tokenize" in (RECIPES / f"{name}.yaml").read_text()]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
# The embedded model is small already, and test_tiny_stories.py trains its lens: here it may wait.
SMALL = [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("tiny")) for name in ARCHITECTURES]
# What a short run on one core has in place of the recipe's own: where it runs, and for how long.
SHORT = {
    "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_text_tokens": 4,
    "eval_rows": 8, "interim_eval_rows": 8, "num_samples": 2, "sample_steps": 0, "eval_fresh_encoder_steps": 2,
    "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def settings_of(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def commands_of(name):
    """The commands of the comment at a recipe's top, as lists of words."""
    comment = []
    for line in (RECIPES / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#"))
    text = "\n".join(line for line in comment if line.startswith("   ")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


def arguments_of(name, which, **changes):
    """The arguments of one of the commands (of `tokenize` the first, of training the last), with others after them,
    which win."""
    words = [words for words in commands_of(name) if words[1] != "submit"][which]
    start = words.index("tokenize" if "tokenize" in words else "examples/train_lens.py") + 1
    return [*words[start:], *(part for key, value in changes.items() for part in (f"--{key}", str(value)))]


def small_subject(name, folder):
    """The recipe's architecture cut small, and a tokenizer of its chats."""
    if ARCHITECTURES[name] == "gemma3_with_images":
        text = {**GEMMA, "num_hidden_layers": NUM_BLOCKS, "max_position_embeddings": 1024}
        images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        images |= {"image_size": 28, "patch_size": 14}
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
        model = AutoModelForCausalLM.from_config(config)
    else:
        sizes = {"num_hidden_layers": NUM_BLOCKS, "max_position_embeddings": 1024}
        model = tiny_model(ARCHITECTURES[name], **sizes)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file):
    """Documents in the columns of the data sets that the recipes read: texts, stories and chats."""
    documents = [" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(24)) for i in range(60)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in documents]
    rows = [{"text": text, "story": text, "messages": chat} for text, chat in zip(documents, chats, strict=True)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module", params=SMALL)
def recipe(request, tmp_path_factory, rows_file):
    """(name, changes): a recipe, and what points it to a small subject and a corpus made by its own command."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    layer = min(settings_of(name).get("layer", NUM_BLOCKS), NUM_BLOCKS - 1)
    changes = {"model": small_subject(name, folder / "subject"), "layer": layer, "output_dir": folder / "run"}
    if name in TOKENISED:
        own = {"dataset": rows_file, "dataset_split": "train", "model": folder / "subject", "num_proc": 1}
        own |= {"validation_fraction": 0.3}
        assert main(["tokenize", *arguments_of(name, 0, **own, output_dir=folder / "corpus")]) == 0
        return name, changes | {"dataset": folder / "corpus"}
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(f"w{3 + i} w7 w9 w{20 + i} w8 w5" for i in range(60)))
    return name, changes | {"dataset": folder / "text.txt"}


def test_every_recipe_is_known_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(ARCHITECTURES)


def test_the_recipes_that_are_asked_for_are_there():
    wanted = {"tiny_stories", "simplestories_5m", "gpt2_openwebtext", "llama2_7b_8xh100", "gemma3_27b_chat"}
    assert wanted <= set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_comment_tells_the_recipes_own_commands(name):
    *before, last = [words for words in commands_of(name) if words[1] != "submit"]
    path = f"examples/recipes/{name}.yaml"
    assert last[:2] == ["accelerate", "launch"] and path in last and "examples/train_lens.py" in last
    launched = [words[words.index("--config_file") + 1] for words in [*before, last] if "--config_file" in words]
    assert all((RECIPES.parents[1] / file).is_file() for file in launched)
    assert all(path in words or words[:2] == ["consistency-lens", "tokenize"] for words in before)
    if name not in TOKENISED:
        return
    settings, (tokenize, planned) = settings_of(name), before
    assert planned == [*last, "--dry_run"]
    said = dict(zip(tokenize[2::2], tokenize[3::2], strict=True))
    assert said["--model"] == settings["model"] and said["--output_dir"] == settings["dataset"]
    assert int(said["--max_length"]) == settings["max_length"]
    # what the pipeline tokenises is the same
    assert said == {
        **{f"--{key}": str(value) for key, value in settings["tokenize"].items()},
        **{flag: said[flag] for flag in ("--model", "--output_dir", "--max_length")},
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_key_is_given_twice(name):
    keys = re.findall(r"^(\w+):", (RECIPES / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    assert len(keys) == len(set(keys))


def test_the_half_for_images_gets_no_adapters():
    targets = settings_of("gemma3_27b_chat")["lora_targets"]
    # as PEFT looks for them in the decoder, in the encoder, and where there are none
    assert re.fullmatch(targets, "model.language_model.layers.0.self_attn.q_proj")
    assert re.fullmatch(targets, "layers.0.mlp.down_proj")
    assert not re.fullmatch(targets, "model.vision_tower.encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_pipeline_reads_it(name):
    recipe = read_recipe([], settings_of(name))
    assert recipe.arguments.model == settings_of(name)["model"]
    assert recipe.sections["tokenize"] == settings_of(name).get("tokenize", {})


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("tiny")])
def test_the_recipes_of_the_embedded_model_are_planned_as_they_are(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(RECIPES.parents[1])
    assert main(["train", *arguments_of(name, -1, output_dir=tmp_path / "run", use_cpu=True), "--dry_run"]) == 0
    assert f"{settings_of(name)['max_steps']:,} (" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simplestories_5m", {"layer": 5, "num_text_tokens": 10, "learning_rate": 1e-4, "min_position": 10}),
        ("gpt2_openwebtext", {"learning_rate": 5e-4, "per_device_train_batch_size": 4, "num_text_tokens": 10}),
        (
            "llama2_7b_8xh100",
            {"layer": 15, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "num_train_epochs": 3}
            | {"bf16": True, "gradient_checkpointing": True, "min_position": 10, "delta_residual": "detached"}
            | {"quantization": "8bit"},
        ),
        ("gemma3_27b_chat", {"layer": 31, "cache_dtype": "float32", "bf16": True}),
    ],
)
def test_figures_that_were_planned_are_kept(name, expected):
    recipe, training = parse_arguments(
        (RecipeArguments, ConsistencyLensTrainingArguments),
        ["--config", str(RECIPES / f"{name}.yaml"), "--use_cpu"],
        sections=RECIPE_SECTIONS,
    )
    found = vars(recipe) | vars(training)
    assert {key: found[key] for key in expected} == expected
    assert training.save_strategy == "steps" and training.save_steps == 100


def plan_of(name, changes):
    arguments = arguments_of(name, -1, **changes, use_cpu=True)
    dataclasses = (RecipeArguments, ConsistencyLensTrainingArguments)
    return dry_run(*parse_arguments(dataclasses, arguments, sections=RECIPE_SECTIONS))


def test_a_dry_run_accepts_it_and_leaves_nothing(recipe, capsys):
    name, changes = recipe
    before = sorted(Path(changes["model"]).parent.rglob("*"))
    assert main(["train", *arguments_of(name, -1, **changes, use_cpu=True), "--dry_run"]) == 0
    assert sorted(Path(changes["model"]).parent.rglob("*")) == before
    settings, out = settings_of(name), capsys.readouterr().out
    assert all(stage.split()[0] in out for stage in settings["stages"])
    planned = plan_of(name, changes)
    assert planned.stages[-1].last_step == planned.total_steps
    parts = {part.part: part for part in planned.parameters}
    assert (parts["decoder"].shared == 0) == (settings["clones"] == "full")


def test_it_trains(recipe):
    name, changes = recipe
    stages = {"stages": short_stages(name)}
    if "unfreeze" in settings_of(name):
        stages["unfreeze"] = [f"{text.split()[0]} 1s" for text in settings_of(name)["unfreeze"]]
    arguments = arguments_of(name, -1, **changes | SHORT)
    assert main(["train", *arguments, *(part for key, value in stages.items() for part in (f"--{key}", *value))]) == 0
    figures = json.loads((changes["output_dir"] / "metrics.json").read_text())
    assert figures["rows"] == 8 and figures["text_perplexity"] > 0
    history = json.loads((changes["output_dir"] / "log_history.json").read_text())
    assert history[-1]["step"] == 3


def short_stages(name):
    """The stages of a recipe with two steps before the last, where a duration in steps is beyond a short run."""
    *before, last = settings_of(name)["stages"]
    return [*(f"{stage.split()[0]} 60%" for stage in before), last]
