"""Runs that publish what they train, on a Hub on loopback, by the real client."""

import errno
import fcntl
import json
import logging
import shutil
from concurrent.futures import wait
from pathlib import Path
from threading import Event

import pytest
import torch
from checkpoint_runs import DiesAt, Killed, curve, tensors, tiny_run
from hub_http import error
from hub_server import ORGANISATION, TOKEN
from huggingface_hub import snapshot_download
from staging_processes import another_process
from transformers import AutoModel

from consistency_lens import ConsistencyLensModel
from consistency_lens.remote_code import remote_code
from consistency_lens.training import publishing_trainer

REPO = f"{ORGANISATION}/lens"
ARTIFACT = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
ARTIFACT |= {"training_arguments.json"}
PLANTED = "hf_planted_token"


def publishing_run(folder, **changes):
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_always_push": True, "max_steps": 6, "save_steps": 3}
    return tiny_run(folder, **(settings | {"stages": ["warm_start"]} | changes))


def files(hub, repo=REPO):
    code = remote_code(ConsistencyLensModel).keys()
    return {
        path: blob.content
        for path, blob in hub.model(repo).head.files.items()
        if path not in {*code, ".gitattributes"}
    }


def staged(run):
    return {path.name for path in run.glob(".push*") if path.is_dir()}


def test_checkpoints_and_the_lens_go_up_and_nothing_else(hub, tmp_path):
    trainer = publishing_run(tmp_path, hub_private_repo=True, hub_strategy="checkpoint")
    run = Path(trainer.args.output_dir)
    (run / "data").mkdir(parents=True)
    (run / "data" / "corpus.txt").write_text("a corpus")
    assert hub.model(REPO).private
    trainer.train()
    repo = hub.model(REPO)
    assert [commit.title for commit in repo.commits[1:]] == [
        "Training in progress, step 3", "Training in progress, step 6",
    ]  # fmt: skip
    last = {path.removeprefix("last-checkpoint/") for path in files(hub) if path.startswith("last-checkpoint/")}
    checkpoint = run / "checkpoint-6"
    assert last == {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    assert {path for path in files(hub) if not path.startswith("last-checkpoint/")} == ARTIFACT
    trainer.lens.set_statistics(torch.ones(32), 2.0)
    assert trainer.push_to_hub("The end").oid == repo.head.oid and repo.head.title == "The end"
    assert staged(run) == set()
    loaded = AutoModel.from_pretrained(REPO, base_model=trainer.lens.subject.model)
    assert all(torch.equal(tensor, tensors(trainer)[name]) for name, tensor in loaded.trained_tensors().items())


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_on_the_hub(hub, tmp_path):
    whole = tiny_run(tmp_path / "whole", stages=["warm_start"], max_steps=6, save_steps=3)
    whole.train()
    killed = publishing_run(tmp_path / "first", hub_strategy="checkpoint")
    killed.add_callback(DiesAt(4))
    with pytest.raises(Killed):
        killed.train()
    killed._finish_current_push()
    shutil.rmtree(tmp_path / "first")
    snapshot_download(REPO, allow_patterns="last-checkpoint/*", local_dir=tmp_path / "pulled")
    resumed = publishing_run(tmp_path / "second", hub_strategy="every_save")
    resumed.train(resume_from_checkpoint=str(tmp_path / "pulled" / "last-checkpoint"))
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(resumed).items())
    assert any(path.startswith("last-checkpoint/") for path in files(hub)), "another strategy leaves it there"


@pytest.mark.slow
def test_each_checkpoint_or_none_but_the_end(hub, tmp_path):
    publishing_run(tmp_path / "all", hub_strategy="all_checkpoints").train()
    assert {path.split("/")[0] for path in files(hub) if "/" in path} == {"checkpoint-3", "checkpoint-6"}
    end = publishing_run(tmp_path / "end", hub_strategy="end", hub_model_id="end", hub_revision="trial")
    end.train()
    assert len(hub.model("user/end").commits) == 1
    end.save_model()
    repo = hub.model("user/end")
    assert repo.at("trial").title == "Model save" and repo.branches["main"] == repo.commits[0].oid


def test_a_hub_that_fails_is_a_warning_until_the_end(hub, tmp_path, caplog):
    trainer = publishing_run(tmp_path, hub_strategy="every_save")
    hub.faults["POST", "/commit/"] = error(403, "", "not today")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "not uploaded: hub: the token has no right to do that in 'lab/lens' (403: not today)" in caplog.text
    with pytest.raises(ValueError, match="not today"):
        trainer.push_to_hub()
    hub.faults.clear()
    trainer.push_to_hub()
    assert files(hub).keys() == ARTIFACT


def test_the_token_is_written_nowhere(hub, tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.token = PLANTED
    with caplog.at_level(logging.DEBUG):
        trainer = publishing_run(tmp_path, hub_token=PLANTED, hub_strategy="checkpoint", max_steps=3)
        trainer.train()
        trainer.push_to_hub()
        hub.token = TOKEN  # the planted one is not taken any more
        with pytest.raises(ValueError, match="does not take the token") as told:
            trainer.push_to_hub()
    assert f"Bearer {PLANTED}" in hub.authorizations
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert PLANTED.encode() not in b"".join([*written, *files(hub).values()])
    assert PLANTED not in caplog.text + str(told.value) + repr(trainer.args) + json.dumps(trainer.args.to_dict())


@pytest.fixture
def go(monkeypatch):
    """What the upload of step 3 waits for."""
    go, commit_folder = Event(), publishing_trainer.commit_folder

    def commit(*args, commit_message, **kwargs):
        if commit_message.endswith("step 3"):
            go.wait(60)
        return commit_folder(*args, commit_message=commit_message, **kwargs)

    monkeypatch.setattr(publishing_trainer, "commit_folder", commit)
    yield go
    go.set()


def push_steps(trainer, *steps):
    """Begins to upload a lens that is another at each step; returns the futures."""
    for step in steps:
        trainer.state.global_step = step
        trainer.lens.set_statistics(torch.ones(32), float(step))
        trainer.save_model(_internal_call=True)
        trainer.push_checkpoint(Path(trainer.args.output_dir))
    return list(trainer.push_in_progress.jobs)


def test_an_upload_waits_for_the_one_before(hub, tmp_path, go):
    trainer = publishing_run(tmp_path)
    jobs = push_steps(trainer, 3, 6)
    wait(jobs[1:], timeout=0.5)  # for an older one must not land upon it
    go.set()
    wait(jobs)
    assert [commit.title for commit in hub.model(REPO).commits[1:]] == [
        "Training in progress, step 3", "Training in progress, step 6",
    ]  # fmt: skip


def test_what_a_killed_run_has_left_goes_and_what_is_on_its_way_stays(hub, tmp_path, go):
    trainer = publishing_run(tmp_path)
    (job,) = push_steps(trainer, 3)
    run = Path(trainer.args.output_dir)
    (run / ".push-2").mkdir()
    with another_process(run / ".push-3"):  # as a training beside this one, which uploads too
        publishing_run(tmp_path)
        assert staged(run) == {".push", ".push-3"}
        assert (run / ".push-3" / "file").is_file()
    go.set()
    assert job.result().oid == hub.model(REPO).head.oid
    publishing_run(tmp_path)
    assert staged(run) == set()


def test_what_cannot_be_staged_is_a_warning_until_the_end_and_leaves_no_folder(hub, tmp_path, caplog, monkeypatch):
    trainer = publishing_run(tmp_path, hub_strategy="every_save", max_steps=3)
    run = Path(trainer.args.output_dir)
    stage_artifact, places = publishing_trainer.stage_artifact, []

    def stage(folder, staging, model_class):
        places.append(staging.name)
        (folder / "metrics.json").write_text('{"fve": NaN}')
        stage_artifact(folder, staging, model_class)

    monkeypatch.setattr(publishing_trainer, "stage_artifact", stage)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "not uploaded: path: metrics.json has nan as 'fve'" in caplog.text
    errors = []  # each of them keeps what it has passed through
    for _ in range(2):
        with pytest.raises(ValueError, match="metrics.json has nan as 'fve'") as caught:
            trainer.push_to_hub()
        errors.append(caught)
    assert places == [".push"] * 3 and staged(run) == set()


def test_a_place_without_locks_is_a_warning_until_the_end(hub, tmp_path, caplog, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (Path(publishing_run(tmp_path).args.output_dir) / ".push").mkdir(parents=True)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(fcntl, "flock", no_locks)
        trainer = publishing_run(tmp_path, hub_strategy="every_save", max_steps=3)
        trainer.train()
    assert f"not uploaded: [Errno {errno.ENOLCK}] No locks available" in caplog.text
    trainer.push_to_hub()
    assert files(hub).keys() == ARTIFACT


def test_a_repository_that_cannot_be_made_is_told_before_the_training(hub, tmp_path):
    with pytest.raises(ValueError, match="hub: the token has no right to do that in 'somebody/lens'"):
        publishing_run(tmp_path, hub_model_id="somebody/lens")
