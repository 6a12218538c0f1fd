"""The steps of a recipe as jobs of a recorded Slurm, and every mistake in a recipe."""

import os
import sys
from pathlib import Path

import pytest
from submitted_recipes import no_slurm, options, recipe, settings_of, slurm, states, subject_folder

from consistency_lens.cli import jobs
from consistency_lens.cli.parser import parse_arguments
from consistency_lens.cli.submit import main

__all__ = ["no_slurm", "recipe", "slurm", "subject_folder"]


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


def test_the_example_is_the_script_that_is_submitted():
    example = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"
    assert example.read_bytes() == jobs.TRAIN_SCRIPT.read_bytes()
    assert os.access(example, os.R_OK)
