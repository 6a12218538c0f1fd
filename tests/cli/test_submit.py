"""The pipeline of a recipe: its steps, as jobs of a recorded Slurm and in the foreground, and every mistake in it."""

import json
import os
import re
import shlex
import shutil
import stat
import sys
from pathlib import Path

import pytest
import yaml
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import jobs
from consistency_lens.cli.main import main as command_line
from consistency_lens.cli.parser import parse_arguments, parse_given, read_yaml
from consistency_lens.cli.pipeline import read_recipe
from consistency_lens.cli.submit import main
from consistency_lens.data.tokenization import TokenizationArguments
from consistency_lens.data.tokenized_corpus import read_tokenization

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"

TEXT = "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))

# Answers as Slurm 22.05 gave them: a number for --parsable, and these two lines with exit code 1 for a partition that
# is not there.
SBATCH = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
calls = folder / "calls.jsonl"
number = 41 + len(calls.read_text().splitlines() if calls.exists() else [])
kept = ("OUTPUT_DIR", "PYTHON", "ACCELERATE_CONFIG")
call = {{"argv": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in kept}}}}
with calls.open("a") as file:
    file.write(json.dumps(call) + "\\n")
refused = os.environ.get("REFUSED")
if refused and any(refused in word for word in sys.argv):
    sys.stderr.write("sbatch: error: invalid partition specified: none\\n")
    sys.stderr.write("sbatch: error: Batch job submission failed: Invalid partition name specified\\n")
    sys.exit(1)
print(os.environ.get("ANSWER") or number)
"""
SQUEUE = """#!{python}
import os
print("\\n".join(os.environ.get("QUEUED", "").split()))
"""


class RecordedSlurm:
    """`sbatch` and `squeue` on PATH that write down how they were called."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE}.items():
            program = folder / name
            program.write_text(text.format(python=sys.executable, folder=str(folder)))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self):
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def commands(self):
        return [call["argv"] for call in self.calls]


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A machine that is no cluster."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def slurm(monkeypatch, no_slurm, tmp_path):
    return RecordedSlurm(tmp_path / "bin")


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def recipe(subject_folder, tmp_path):
    """Writes a recipe and returns the flags that name it."""

    def recipe(**changes):
        settings = {
            "model": str(subject_folder), "layer": 1, "num_text_tokens": 3, "min_position": 4, "max_length": 16,
            "dataset": str(subject_folder / "text.txt"), "positions_per_sequence": 3, "validation_fraction": 0.3,
            "eval_rows": 16, "num_samples": 2, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True,
            "output_dir": str(tmp_path / "run"), "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "learning_rate": 1e-3, "stages": ["warm_start 50%", "gumbel"], "eval": {"checks": ["none"]},
        } | changes  # fmt: skip
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        return ["--config", str(file)]

    return recipe


@pytest.fixture
def in_process(monkeypatch):
    """Steps run in this process, which has loaded all they need; what ran is listed."""
    ran = []

    def run(command):
        assert command[:3] == [sys.executable, "-m", "consistency_lens"]
        ran.append(command[3])
        return command_line(command[3:])

    monkeypatch.setattr(jobs, "run_in_foreground", run)
    return ran


def settings_of(folder, step):
    return yaml.safe_load((folder / "steps" / f"{step}.yaml").read_text())


def options(command):
    return dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)


def states(printed):
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {row[0]: row[1] for row in table}


class TestOnACluster:
    def test_each_step_is_a_job_that_waits_for_the_one_before(self, slurm, recipe, tmp_path, capsys):
        assert main(recipe()) == 0
        tokenize, cache, train, evaluate = (options(command) for command in slurm.commands)
        names = [command["job-name"] for command in (tokenize, cache, train, evaluate)]
        assert names == ["tokenize-run", "cache-run", "train-run", "eval-run"]
        after = [command.get("dependency") for command in (tokenize, cache, train, evaluate)]
        assert after == [None, "afterok:41", "afterok:42", "afterok:43"]
        assert [command.get("kill-on-invalid-dep") for command in (tokenize, cache)] == [None, "yes"]
        run = tmp_path / "run"
        for name, command in {"tokenize": tokenize, "cache": cache, "eval": evaluate}.items():
            assert (
                command["wrap"] == f"exec {sys.executable} -m consistency_lens {name} --config {run}/steps/{name}.yaml"
            )
        assert slurm.commands[2][-3:] == [str(jobs.TRAIN_SCRIPT), "--config", f"{run}/steps/train.yaml"]
        assert slurm.calls[2]["environment"] == {
            "OUTPUT_DIR": str(run), "PYTHON": sys.executable, "ACCELERATE_CONFIG": None,
        }  # fmt: skip
        assert {command["nodes"] for command in (tokenize, cache, train, evaluate)} == {"1"}
        assert [command.get("gpus-per-node") for command in (tokenize, cache, train, evaluate)] == [
            None,
            "1",
            "1",
            "1",
        ]
        assert all(command[0] == "--parsable" for command in slurm.commands)
        printed = capsys.readouterr().out
        assert "scancel 41 42 43 44" in printed and f"{run}/logs/train-43.log" in printed
        assert (run / "logs").is_dir()

    def test_flags_lie_on_top_of_the_recipe_and_sections_go_to_their_steps(self, slurm, recipe, tmp_path):
        flags = recipe(submit={"nodes": 2, "gpus_per_node": 4, "time": "12:00:00", "nodelist": "a,b"})
        flags += ["--gpus_per_node", "8", "--learning_rate", "2e-3", "--stages", "warm_start 25%", "gumbel"]
        flags += ["--partition", "big", "--account=me", "--constraint=h100", "--sbatch_args", "--qos=high --mem=0"]
        assert main(flags) == 0
        tokenize, cache, train, evaluate = (options(command) for command in slurm.commands)
        assert [command["nodes"] for command in (tokenize, cache, train, evaluate)] == ["1", "1", "2", "1"]
        assert [command.get("gpus-per-node") for command in (tokenize, cache, train, evaluate)] == [
            None,
            "8",
            "8",
            "1",
        ]
        assert [command["cpus-per-task"] for command in (tokenize, cache, train, evaluate)] == ["8", "64", "64", "8"]
        assert [command.get("nodelist") for command in (tokenize, cache, train, evaluate)] == [None, None, "a,b", None]
        for command in (tokenize, cache, train, evaluate):
            assert command["time"] == "12:00:00" and command["partition"] == "big" and command["account"] == "me"
            assert command["constraint"] == "h100" and command["qos"] == "high" and command["mem"] == "0"
        assert "-m torch.distributed.run --standalone --nproc_per_node 8 -m consistency_lens cache" in cache["wrap"]
        settings = settings_of(tmp_path / "run", "train")
        assert settings["learning_rate"] == 2e-3 and settings["stages"] == ["warm_start 25%", "gumbel"]
        assert settings_of(tmp_path / "run", "eval")["checks"] == ["none"]

    def test_no_gpus_are_asked_for_where_there_are_none(self, slurm, recipe):
        assert main([*recipe(), "--gpus_per_node", "0"]) == 0
        # the script of the training asks for some, unless it is told
        assert [options(command).get("gpus-per-node") for command in slurm.commands] == [None, None, "0", None]

    def test_a_file_of_accelerate_goes_to_the_training(self, slurm, recipe, tmp_path):
        (tmp_path / "fsdp.yaml").write_text("")
        assert main([*recipe(), "--accelerate_config", str(tmp_path / "fsdp.yaml")]) == 0
        files = [call["environment"]["ACCELERATE_CONFIG"] for call in slurm.calls]
        assert files == [None, None, str(tmp_path / "fsdp.yaml"), None]

    def test_a_refusal_says_which_jobs_are_out_and_how_to_take_them_back(self, slurm, recipe, monkeypatch, capsys):
        monkeypatch.setenv("REFUSED", "train.sbatch")
        assert main(recipe()) == 1
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 1
        assert "failed: train: sbatch ended with exit code 1 and said: sbatch: error: invalid partition" in printed[0]
        assert "jobs 41 42 are submitted already; take them back: scancel 41 42" in printed[0]
        assert len(slurm.calls) == 3

    def test_a_refusal_of_the_first_leaves_none(self, slurm, recipe, monkeypatch, capsys):
        monkeypatch.setenv("REFUSED", "tokenize")
        assert main(recipe()) == 1
        assert capsys.readouterr().err.rstrip().endswith("none is submitted")

    @pytest.mark.parametrize("answer", ["Submitted batch job 12", "twelve"])
    def test_an_answer_that_is_no_number_is_an_error(self, slurm, recipe, monkeypatch, capsys, answer):
        monkeypatch.setenv("ANSWER", answer)
        assert main(recipe()) == 1
        assert f"tokenize: sbatch answered {answer!r} instead of the number of a job" in capsys.readouterr().err

    def test_a_cluster_may_have_its_name_in_the_answer(self, slurm, recipe, monkeypatch):
        monkeypatch.setenv("ANSWER", "12;north")
        assert main(recipe()) == 0
        assert options(slurm.commands[1])["dependency"] == "afterok:12"

    def test_a_run_is_not_submitted_twice(self, slurm, recipe, monkeypatch, capsys):
        assert main(recipe()) == 0
        monkeypatch.setenv("QUEUED", "43 44")
        assert main(recipe()) == 2
        assert "jobs 43 44 of an earlier submit" in capsys.readouterr().err
        assert len(slurm.calls) == 4
        monkeypatch.setenv("QUEUED", "")
        assert main(recipe()) == 0
        assert len(slurm.calls) == 8

    def test_a_dry_run_prints_the_commands_and_does_nothing(self, slurm, recipe, tmp_path, capsys):
        assert main([*recipe(), "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert not (tmp_path / "run").exists() and slurm.calls == []
        assert "--dependency=afterok:<cache>" in printed and f"OUTPUT_DIR={tmp_path / 'run'}" in printed
        assert "num_text_tokens: 3" in printed
        assert states(printed) == dict.fromkeys(("tokenize", "cache", "train", "eval"), "to run")

    def test_resuming_is_told_to_the_training(self, slurm, recipe, tmp_path):
        (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
        assert main([*recipe(), "--resume"]) == 0
        assert settings_of(tmp_path / "run", "train")["resume_from_checkpoint"] == "auto"


class TestHere:
    def test_the_steps_run_in_order_and_what_is_there_is_not_made_again(
        self, no_slurm, recipe, in_process, tmp_path, capsys
    ):
        run = tmp_path / "run"
        assert main(recipe()) == 0
        assert in_process == ["tokenize", "cache", "train", "eval"]
        provenance = json.loads((run / "provenance.json").read_text())
        cache = run / "data" / "activations" / "text"
        assert provenance["recipe"]["activations"].startswith(str(cache))
        assert (run / "evaluation" / "metrics.json").is_file()
        capsys.readouterr()

        assert main(recipe()) == 0
        assert states(capsys.readouterr().out) == dict.fromkeys(("tokenize", "cache", "train", "eval"), "here already")
        assert len(in_process) == 4

        # where nothing reads them, corpus and cache may be gone
        shutil.rmtree(run / "data" / "corpus")
        assert main(recipe()) == 0
        assert states(capsys.readouterr().out)["tokenize"] == "not needed"
        shutil.rmtree(cache)
        assert main(recipe()) == 0
        assert states(capsys.readouterr().out)["cache"] == "not needed"
        assert len(in_process) == 4

        # the evaluation reads the activations, and these the corpus
        (run / "evaluation" / "metrics.json").unlink()
        assert main(recipe()) == 0
        assert in_process[4:] == ["tokenize", "cache", "eval"]

        assert main([*recipe(), "--force", "train"]) == 0
        assert in_process[7:] == ["train", "eval"]
        assert main([*recipe(), "--force", "cache"]) == 0
        assert in_process[9:] == ["cache", "train", "eval"]

        # and what was made with other settings is not taken for it
        capsys.readouterr()
        assert main([*recipe(), "--learning_rate", "2e-3"]) == 2
        assert "made with learning_rate 0.001, now it is 0.002" in capsys.readouterr().err
        assert main([*recipe(), "--positions_per_sequence", "2"]) == 2
        assert "was made with positions_per_sequence 3, now it is 2" in capsys.readouterr().err
        assert main([*recipe(), "--max_length", "12"]) == 2
        assert "was made with max_length 16, now it is 12" in capsys.readouterr().err
        assert main([*recipe(), "--eval_rows", "8"]) == 2
        assert "eval_rows 16, now it is 8" in capsys.readouterr().err
        assert main([*recipe(), "--logging_steps", "1"]) == 0
        assert len(in_process) == 12

    def test_a_step_that_fails_is_named_and_ends_it(self, no_slurm, recipe, monkeypatch, tmp_path, capsys):
        codes = {"tokenize": 0, "cache": 2}
        monkeypatch.setattr(jobs, "run_in_foreground", lambda command: codes[command[3]])
        assert main(recipe()) == 1
        assert "failed: cache: ended with exit code 2" in capsys.readouterr().err
        monkeypatch.setattr(jobs, "run_in_foreground", lambda command: -9)
        assert main(recipe()) == 1
        assert "failed: tokenize: ended by the signal SIGKILL" in capsys.readouterr().err

    def test_a_training_that_was_interrupted_ends_it_too(self, no_slurm, recipe, monkeypatch, tmp_path, capsys):
        def run(command):
            assert command[3] != "eval"
            if command[3] == "train":
                (tmp_path / "run" / "interrupted.json").write_text("{}")
                (tmp_path / "run" / "checkpoint-2").mkdir()
            return 0

        monkeypatch.setattr(jobs, "run_in_foreground", run)
        assert main(recipe()) == 1
        assert "train: interrupted, with a checkpoint saved; the same command with --resume" in capsys.readouterr().err
        # which would be lost
        assert main(recipe()) == 2
        assert "has checkpoints of an unfinished training; pass --resume to go on" in capsys.readouterr().err

    def test_several_processes_share_training_and_caching(self, no_slurm, recipe, tmp_path, capsys):
        assert main([*recipe(), "--gpus_per_node", "2", "--dry_run"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(sys.executable)]
        launched = [" -m torch.distributed.run --standalone --nproc_per_node 2 -m " in line for line in lines]
        assert launched == [False, True, True, False]
        (tmp_path / "fsdp.yaml").write_text("")
        assert main([*recipe(), "--accelerate_config", str(tmp_path / "fsdp.yaml"), "--dry_run"]) == 0
        assert "-m accelerate.commands.launch --config_file" in capsys.readouterr().out

    def test_local_runs_here_though_there_is_a_cluster(self, slurm, recipe, monkeypatch):
        ran = []
        monkeypatch.setattr(jobs, "run_in_foreground", lambda command: ran.append(command[3]) or 0)
        assert main([*recipe(), "--local"]) == 0
        assert ran == ["tokenize", "cache", "train", "eval"] and slurm.calls == []

    def test_a_command_is_run_and_its_exit_code_returned(self):
        assert jobs.run_in_foreground([sys.executable, "-c", "raise SystemExit(5)"]) == 5
        # a wish to end this process reaches the command, which may save
        script = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(6)); "
        script += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
        assert jobs.run_in_foreground([sys.executable, "-c", script]) == 6


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


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "flags", "message"),
        [
            ({}, ["--learning_rat", "1"], "--learning_rat: unknown; did you mean --learning_rate?"),
            ({}, ["--gpus_per_nod", "1"], "--gpus_per_nod: unknown; did you mean --gpus_per_node?"),
            ({}, ["stray"], "'stray': belongs to no flag"),
            ({}, ["--max_steps", "x"], "--max_steps: invalid int value: 'x'"),
            ({}, ["--nodes", "x"], "--nodes: invalid int value: 'x'"),
            ({"learning_rat": 1}, [], "the recipe has the unknown key 'learning_rat'; did you mean 'learning_rate'"),
            ({"submit": {"node": 1}}, [], "the section 'submit' of the recipe has the unknown key 'node'"),
            ({"tokenize": {"packin": True}}, [], "'tokenize' of the recipe has the unknown key 'packin'"),
            ({"cache": {"layer": 1}}, [], "the section 'cache' of the recipe has the unknown key 'layer'"),
            ({"eval": ["x"]}, [], "eval must hold 'key: value' lines, got ['x']"),
            ({"submit": 3}, [], "submit must hold 'key: value' lines, got 3"),
            ({"output_dir": None}, [], "output_dir: got none"),
            ({"model": None}, [], "model: got none"),
            ({"dataset": "no/such.txt"}, [], "dataset: nothing at 'no/such.txt'"),
            ({"dataset": "/no/such/folder"}, [], "dataset: nothing at '/no/such/folder'"),
            ({"stages": ["warm_start 9s", "gumbel"]}, [], "stages: the last would start at step 9 of 4"),
            ({"lm_reference": "x"}, [], "lm_reference"),
            ({"layer": 99}, [], "layer must lie in 0.."),
            ({"model": "no/such/model"}, [], "model: cannot load 'no/such/model'"),
            ({"activations": "on_the_fly", "cache": {"batch_size": 4}}, [], "remove the section"),
            ({"dataset": None, "tokenize": {"packing": True}}, [], "remove the section"),
            ({}, ["--force", "all"], "force must be one of tokenize, cache, train, eval, got 'all'"),
            ({"dataset": None}, ["--force", "cache"], "force: got 'cache', but this recipe has no such step"),
            ({}, ["--nodes", "0"], "nodes must be at least 1, got 0"),
            ({}, ["--gpus_per_node", "-1"], "gpus_per_node must be at least 0, got -1"),
            ({}, ["--cpus_per_node", "0"], "cpus_per_node must be at least 1, got 0"),
            ({}, ["--accelerate_config", "no.yaml"], "accelerate_config: no file at 'no.yaml'"),
            ({}, ["--sbatch_args", "--comment='x y"], "sbatch_args: cannot read"),
            ({}, ["--hub_token", "hf_planted"], "hub_token: settings of steps are kept in files; log in with"),
            ({}, ["--nodes", "2", "--local"], "nodes: got 2, but --local runs here"),
        ],
    )
    def test_each_is_one_line_before_any_job(self, slurm, recipe, tmp_path, capsys, changes, flags, message):
        assert main([*recipe(**changes), *flags]) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert len(printed) == 1 and printed[0].startswith("error: ") and message in printed[0]
        assert slurm.calls == [] and not (tmp_path / "run").exists()

    def test_several_nodes_need_a_cluster(self, no_slurm, recipe, capsys):
        assert main([*recipe(), "--nodes", "2"]) == 2
        assert "nodes: got 2, but there is no sbatch here" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "message"), [("a: [1", "is no YAML"), ("- a\n", "key: value"), (None, "no file at")]
    )
    def test_a_recipe_that_cannot_be_read(self, no_slurm, tmp_path, capsys, text, message):
        file = tmp_path / "recipe.yaml"
        if text is not None:
            file.write_text(text)
        assert main(["--config", str(file)]) == 2
        assert message in capsys.readouterr().err

    def test_forcing_removes_no_folder_that_no_step_has_made(self, slurm, recipe, subject_folder, tmp_path):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "notes.txt").write_text("kept")
        flags = recipe(dataset=str(mine), tokenize={"dataset": str(subject_folder / "text.txt")})
        assert main([*flags, "--force", "tokenize"]) == 0
        assert (mine / "notes.txt").read_text() == "kept"

    def test_a_command_alone_reads_no_section_of_another(self, tmp_path):
        from consistency_lens.cli.verify import VerifyArguments

        (tmp_path / "a.yaml").write_text("cache: x\neval: {rows: 1}\n")
        with pytest.raises(ValueError, match="unknown key 'eval'"):
            parse_arguments((VerifyArguments,), ["--config", str(tmp_path / "a.yaml")])


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


def test_the_example_is_the_script_that_is_submitted():
    example = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"
    assert example.read_bytes() == jobs.TRAIN_SCRIPT.read_bytes()
    assert os.access(example, os.R_OK)
