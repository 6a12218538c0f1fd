"""Recipes to submit, a Slurm that writes down how it was called, and what came of them."""

import json
import stat
import sys

import pytest
import yaml
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import jobs
from consistency_lens.cli.main import main as command_line

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
