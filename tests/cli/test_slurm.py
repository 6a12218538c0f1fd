"""The pipeline on a real Slurm of one node, which starts here and stops again (`make test-slow`)."""

import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm_cluster import SlurmCluster, why_not_here

from consistency_lens.cli.submit import main

ROOT = Path(__file__).parents[2]
WORDS = (
    "once upon a time there was little girl named lily she loved to play with her dog they went park big red".split()
)
STEPS = ("tokenize", "cache", "train", "eval")
SECONDS = 600

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))]


@pytest.fixture(scope="module")
def cluster():
    # munge's socket wants a short path
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with SlurmCluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def submit(cluster, monkeypatch, tmp_path):
    """Writes a recipe, submits it, and returns the jobs: step -> number."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    documents = [" ".join(words.choices(WORDS, k=60)) for _ in range(60)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(documents))

    def submit(*flags, **changes):
        settings = {
            "model": str(ROOT / "examples" / "tiny_stories"), "layer": 1, "dataset": "stories.txt", "max_length": 48,
            "num_text_tokens": 3, "min_position": 4, "positions_per_sequence": 3, "validation_fraction": 0.3,
            "eval_rows": 16, "num_samples": 2, "interim_eval_rows": 8, "tracked_samples": 4, "max_steps": 6,
            "stages": ["warm_start 50%", "gumbel"], "per_device_train_batch_size": 4, "learning_rate": 1e-3,
            "use_cpu": True, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
            "output_dir": "run", "eval": {"checks": ["none"], "num_bootstrap": 20},
            "submit": {"gpus_per_node": 0, "cpus_per_node": 1},
        } | changes  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        assert main(["--config", "recipe.yaml", *flags]) == 0
        return json.loads((Path(settings["output_dir"]) / "steps" / "jobs.json").read_text())

    return submit


def test_the_jobs_of_a_pipeline_run_one_after_the_other(cluster, submit, capsys):
    jobs = submit()
    assert tuple(jobs) == STEPS
    done = [cluster.wait(jobs[step], ("COMPLETED", "FAILED", "CANCELLED"), SECONDS) for step in STEPS]
    assert [job["JobState"] for job in done] == ["COMPLETED"] * 4
    assert all(before["EndTime"] <= after["StartTime"] for before, after in zip(done, done[1:], strict=False))
    run = Path("run")
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["rows"] == 16
    assert json.loads((run / "run.json").read_text())["recipe"]["activations"].startswith("run/data/activations")
    assert sorted(path.name.split("-")[0] for path in (run / "logs").iterdir()) == sorted(STEPS)
    capsys.readouterr()
    assert main(["--config", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.count("here already") == 4


def test_what_waits_for_a_job_that_fails_does_not_run(cluster, submit):
    # it shows when the weights are loaded, and no earlier
    jobs = submit(dataset=None, num_documents=8, final_norm="no.such.norm")
    assert tuple(jobs) == ("train", "eval")
    assert cluster.wait(jobs["train"], ("FAILED", "COMPLETED"), SECONDS)["ExitCode"] == "2:0"
    assert cluster.wait(jobs["eval"], ("CANCELLED", "COMPLETED"), 120)["JobState"] == "CANCELLED"
    assert not Path("run", "metrics.json").exists()


def test_a_job_whose_time_is_up_goes_on_later_and_ends_as_if_nothing_had_been(cluster, submit):
    settings = {"cache_dir": "data", "max_steps": 80, "save_steps": 10, "stages": ["warm_start 50%", "gumbel"]}
    undisturbed = submit(**settings, output_dir="undisturbed")
    assert cluster.wait(undisturbed["eval"], ("COMPLETED", "CANCELLED"), SECONDS)["JobState"] == "COMPLETED"

    jobs = submit(**settings, output_dir="interrupted")
    assert tuple(jobs) == ("train", "eval")  # the cache is shared
    cluster.wait_until(
        "a checkpoint", lambda: any(Path("interrupted").glob("checkpoint-*/model.safetensors")), SECONDS
    )
    # as --signal=B:USR1@300 does; no sooner is this job to be seen again than the scheduler has put it back
    cluster.run("scancel", "--batch", "--signal=USR1", jobs["train"])
    cluster.wait(jobs["train"], ("PENDING",), 120)
    interrupted = json.loads(Path("interrupted", "interrupted.json").read_text())
    assert interrupted["signal"] == "SIGUSR1" and 10 <= interrupted["step"] < 80
    assert cluster.job(jobs["eval"])["JobState"] == "PENDING"

    train = cluster.wait(jobs["train"], ("COMPLETED", "FAILED", "CANCELLED"), SECONDS)
    assert (train["JobState"], train["Restarts"]) == ("COMPLETED", "1")
    evaluate = cluster.wait(jobs["eval"], ("COMPLETED", "CANCELLED"), SECONDS)
    assert evaluate["JobState"] == "COMPLETED" and evaluate["StartTime"] >= train["EndTime"]
    tensors, expected = (load_file(Path(run) / "model.safetensors") for run in ("interrupted", "undisturbed"))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    losses, expected = (
        [entry["loss"] for entry in json.loads((Path(run) / "log_history.json").read_text()) if "loss" in entry]
        for run in ("interrupted", "undisturbed")
    )
    assert len(losses) == 80 and losses == expected
