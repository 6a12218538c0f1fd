"""The steps of a recipe one after the other on this machine: what runs, what is there already, what ends it."""

import json
import shutil
import sys

from submitted_recipes import in_process, no_slurm, recipe, slurm, states, subject_folder

from consistency_lens.cli import jobs
from consistency_lens.cli.submit import main

__all__ = ["in_process", "no_slurm", "recipe", "slurm", "subject_folder"]


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
