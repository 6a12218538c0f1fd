"""Trackers are not installed for the tests; what transformers' callbacks and ours call of them is recorded here."""

import json
import socket
from types import ModuleType

import pytest
from lens_runs import tiny_trainer

from consistency_lens.training.tracking import TrackedRun, identify_run, machine_facts, read_run


class Config(dict):
    def update(self, values, allow_val_change=False):
        assert allow_val_change  # or wandb refuses to change what a resumed run has already
        super().update(values)


@pytest.fixture
def trackers(monkeypatch):
    """wandb and trackio as modules that keep what they are told."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    modules = {}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.run, module.config, module.inits = None, Config(), []

        def init(module=module, **settings):
            module.inits.append(settings)
            module.run = settings

        module.init = init
        monkeypatch.setitem(__import__("sys").modules, name, module)
        modules[name] = module
    return modules


def tracked_trainer(folder, **settings):
    """A trainer that reports to both, without transformers' callbacks, which need the real ones."""
    trainer = tiny_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1, **settings)
    trainer.args.report_to = ["wandb", "trackio"]
    return trainer


def test_a_resumed_run_is_the_same_run(tmp_path, trackers, monkeypatch):
    wandb = trackers["wandb"]
    tracked_trainer(tmp_path, run_name="mine").train()
    (first,) = wandb.inits
    assert first == {"project": "huggingface", "name": "mine", "id": first["id"], "resume": "allow"}
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert json.loads((folder / "tracked_run.json").read_text()) == {"name": "mine", "id": first["id"]}
    wandb.run = None  # another process
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    resumed = tracked_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert wandb.inits[1] == first  # trackio goes by the name alone, which its own callback hands over
    assert resumed.args.run_name == "mine"
    for tracker in trackers.values():
        assert tracker.config["machine"]["job_id"] == "77"


def test_a_run_that_is_open_already_stays(tmp_path, trackers):
    trackers["wandb"].run = {"id": "opened by the caller"}
    tracked_trainer(tmp_path).train()
    assert trackers["wandb"].inits == []


def test_an_id_in_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "tracked_run.json").write_text('{"name": "mine", "id": "kept"}')
    assert identify_run(None, tmp_path / "checkpoint-1") == TrackedRun("mine", "kept")
    assert identify_run("other", tmp_path / "checkpoint-1") == TrackedRun("other", "kept")
    new = identify_run(None, None)
    assert new.id != identify_run(None, None).id and new.name is None
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert identify_run(None, tmp_path / "checkpoint-1") == TrackedRun("mine", "given")
    assert read_run(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, {}),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_JOB_NAME": "lens",
                "SLURM_RESTART_COUNT": "1",
            },
            {"job_id": "7", "nodes": "n[1-2]", "job_name": "lens", "restarts": "1"},
        ),
        ({"LSB_JOBID": "8", "LSB_HOSTS": "a a b"}, {"job_id": "8", "nodes": "a a b"}),
        ({"PBS_JOBID": "9.server"}, {"job_id": "9.server"}),
    ],
)
def test_the_job_is_what_its_scheduler_says(environment, job):
    assert machine_facts(environment) == {"host": socket.gethostname(), **job}
