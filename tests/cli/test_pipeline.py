"""Which steps a recipe has, and what each of them is told."""

import re
import shlex
from pathlib import Path

import pytest
from submitted_recipes import in_process, no_slurm, recipe, settings_of, slurm, states, subject_folder
from tiny_models import tiny_model

from consistency_lens.cli.main import main as command_line
from consistency_lens.cli.parser import parse_given, read_yaml
from consistency_lens.cli.pipeline import read_recipe
from consistency_lens.cli.submit import main
from consistency_lens.data.tokenization import TokenizationArguments
from consistency_lens.data.tokenized_corpus import read_tokenization

__all__ = ["in_process", "no_slurm", "recipe", "slurm", "subject_folder"]

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


class TestSteps:
    def steps(self, flags, capsys):
        assert main([*flags, "--dry_run"]) == 0
        return states(capsys.readouterr().out)

    def test_a_subject_that_writes_its_own_text_needs_no_corpus(self, no_slurm, recipe, capsys):
        assert list(self.steps(recipe(dataset=None), capsys)) == ["train", "eval"]

    def test_activations_on_the_fly_need_a_corpus_alone(self, slurm, recipe, tmp_path, capsys):
        assert list(self.steps(recipe(activations="on_the_fly"), capsys)) == ["tokenize", "train", "eval"]
        assert main(recipe(activations="on_the_fly")) == 0
        assert settings_of(tmp_path / "run", "train")["dataset"] == str(tmp_path / "run" / "data" / "corpus")

    @pytest.mark.parametrize("activations", ["me/published", "folder"])
    def test_activations_that_are_there_need_nothing_before(self, no_slurm, recipe, capsys, activations):
        assert list(self.steps(recipe(activations=activations, dataset=None), capsys)) == ["train", "eval"]

    def test_a_corpus_that_is_there_is_cached(self, slurm, recipe, subject_folder, tmp_path, capsys):
        corpus = tmp_path / "corpus"
        tokens = {"dataset": subject_folder / "text.txt", "model": subject_folder, "output_dir": corpus}
        assert (
            command_line(["tokenize", *(str(part) for name, value in tokens.items() for part in (f"--{name}", value))])
            == 0
        )
        capsys.readouterr()
        assert list(self.steps(recipe(dataset=str(corpus)), capsys)) == ["cache", "train", "eval"]
        assert main(recipe(dataset=str(corpus))) == 0
        assert settings_of(tmp_path / "run", "cache")["dataset"] == str(corpus)
        train = settings_of(tmp_path / "run", "train")
        assert "dataset" not in train
        assert train["activations"].startswith(str(tmp_path / "run" / "data" / "activations" / "text"))

    def test_a_recipe_may_say_what_its_corpus_is_made_of(self, slurm, recipe, in_process, subject_folder, tmp_path):
        corpus, text = tmp_path / "corpus", str(subject_folder / "text.txt")
        flags = recipe(dataset=str(corpus), tokenize={"dataset": text, "max_length": 12}, cache={"batch_size": 4})
        assert main([*flags, "--local"]) == 0
        assert read_tokenization(corpus)["settings"]["max_length"] == 12
        assert settings_of(tmp_path / "run", "cache")["batch_size"] == 4
        # the same file serves a command alone
        assert command_line(["train", *flags, "--output_dir", str(tmp_path / "alone")]) == 0

    def test_the_middle_layer_is_named(self, slurm, recipe, tmp_path):
        assert main(recipe(layer=None)) == 0
        train = settings_of(tmp_path / "run", "train")
        assert settings_of(tmp_path / "run", "cache")["layer"] == [train["layer"]]
        assert train["activations"].endswith(f"layer_{train['layer']}")
        assert train["layer"] == tiny_model("llama").config.num_hidden_layers // 2

    def test_the_cache_gets_what_training_would_make(self, slurm, recipe, tmp_path):
        assert main([*recipe(), "--seed", "7", "--dtype", "bfloat16"]) == 0
        settings = settings_of(tmp_path / "run", "cache")
        expected = {"seed": 7, "dtype": "bfloat16", "cache_dtype": "float32", "positions_per_sequence": 3}
        assert expected.items() <= settings.items() and settings["min_position"] == 4
        tokens = settings_of(tmp_path / "run", "tokenize")
        assert tokens["max_length"] == 16 and tokens["validation_fraction"] == 0.3

    def test_no_device_is_needed_where_a_recipe_is_submitted(self, slurm, recipe, tmp_path):
        # TrainingArguments refuse these on a login node without a GPU
        assert main([*recipe(use_cpu=None), "--bf16", "true", "--tf32", "true"]) == 0
        settings = settings_of(tmp_path / "run", "train")
        assert settings["bf16"] is True and settings["tf32"] is True and "use_cpu" not in settings


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_what_the_command_in_its_comment_does(path):
    recipe = read_recipe([], read_yaml(path))
    comment = path.read_text().partition("model:")[0].replace("\\\n#", "")
    command = re.search(r"consistency-lens tokenize (.*)", comment)
    if command is None:
        assert recipe.sections["tokenize"] == {}
        return
    said, rest = parse_given((TokenizationArguments,), shlex.split(command[1]), {})
    arguments = recipe.arguments
    own = {"model": arguments.model, "max_length": arguments.max_length, "output_dir": arguments.dataset}
    assert rest == [] and said == own | recipe.sections["tokenize"]
