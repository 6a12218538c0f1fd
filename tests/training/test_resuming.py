"""A run that was cut short and goes on is the run that was not; and what cannot go on says so."""

import resource
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import DiesAt, Killed, curve, tensors, tiny_run
from transformers import EarlyStoppingCallback, TrainerCallback

from consistency_lens.checkpoints import trainer as whole_trainer
from consistency_lens.checkpoints.manifest import MANIFEST_FILE
from consistency_lens.checkpoints.resuming import checkpoint_to_resume
from consistency_lens.checkpoints.states import CheckpointWriteError, checkpoints_in


def killed_at(folder, step, **changes):
    """Trains in a folder, from its newest whole checkpoint if it has one, until the end of that step."""
    trainer = tiny_run(folder, resume_from_checkpoint="auto", **changes)
    trainer.add_callback(DiesAt(step))
    with pytest.raises(Killed):
        trainer.train(checkpoint_to_resume(trainer.args))
    return trainer


def to_the_end(folder, **changes):
    trainer = tiny_run(folder, resume_from_checkpoint="auto", **changes)
    trainer.train(checkpoint_to_resume(trainer.args))
    return trainer


def assert_same(resumed, whole):
    assert curve(resumed) == curve(whole)
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(resumed)[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    trainer = tiny_run(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


# Exact


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, whole, caplog):
    """Killed before the first checkpoint, between two, at the end of a stage and of an epoch."""
    for step in (1, 4, 5, 10, 11):
        killed_at(tmp_path, step)
    resumed = to_the_end(tmp_path)
    assert_same(resumed, whole)
    assert len(curve(whole)) == 4 and "kl" in curve(whole)[2]
    assert "resumed with" not in caplog.text and "not whole" not in caplog.text


@pytest.mark.slow  # that a run goes on at the very row is in test_activation_sources.py, too
@pytest.mark.parametrize("source", ["stream", "on_the_fly"])
def test_rows_that_are_not_stored_go_on_at_the_same_place(tmp_path, source):
    settings = {"source": source, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 6, "max_steps": 8}
    settings |= {"stages": ["warm_start"], "logging_steps": 1}
    undisturbed = to_the_end(tmp_path / "whole", **settings)
    for step in (3, 7):  # an epoch has 6 steps
        killed_at(tmp_path / "killed", step, **settings)
    assert_same(to_the_end(tmp_path / "killed", **settings), undisturbed)


class Dying:
    """Replaces a function by one that dies when it is called, or lets it through a few times before that."""

    def __init__(self, function, times=0, error=None):
        self.function, self.times, self.error = function, times, error or Killed()

    def __call__(self, *args, **kwargs):
        self.times -= 1
        if self.times < 0:
            raise self.error
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("part", ["save_random_states", "write_manifest"])
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    tmp_path, whole, monkeypatch, caplog, part
):
    place = whole_trainer if part.startswith("write") else whole_trainer.states
    with monkeypatch.context() as patch:
        patch.setattr(place, part, Dying(getattr(place, part), times=2))
        with pytest.raises(Killed):
            tiny_run(tmp_path, save_total_limit=1).train()
    names = [path.name for path in checkpoints_in(tmp_path / "run").values()]
    assert names == ["checkpoint-4", "checkpoint-6"]  # what is to be removed waits until the new one is whole
    assert_same(to_the_end(tmp_path, save_total_limit=1), whole)
    assert "checkpoint-6 is not whole (no manifest.json: its writing was cut short); taking the one" in caplog.text
    # the one that the run went on from stays
    assert names_of(tmp_path) == ["checkpoint-4", "checkpoint-13"]


WARM_START = {"stages": ["warm_start"], "max_steps": 8}


def test_seconds_and_skipped_steps_go_on(tmp_path):
    trainer = tiny_run(tmp_path, **WARM_START)
    trainer.skipper.skipped, trainer.skipper.in_a_row = 5, 1
    trainer.add_callback(DiesAt(5))
    with pytest.raises(Killed):
        trainer.train()
    saved = max(entry["seconds"] for entry in trainer.state.log_history)
    trainer._training_since -= 1000
    trainer._save_checkpoint(trainer.model, None)
    resumed = to_the_end(tmp_path, **WARM_START)
    entries = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert entries[-1]["skipped_steps"] == 5
    assert entries[0]["seconds"] <= saved and entries[-1]["seconds"] > 1000


def test_the_mean_loss_of_a_resumed_run_is_of_its_own_steps(tmp_path):
    every = [entry["loss"] for entry in curve(to_the_end(tmp_path / "every", **WARM_START, logging_steps=1))]
    killed_at(tmp_path / "killed", 5, **WARM_START)
    resumed = to_the_end(tmp_path / "killed", **WARM_START)  # from step 4, and the last log was at 3
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(every[4:]) / 4)


def test_the_scale_of_float16_losses_is_kept(tmp_path):
    trainer = tiny_run(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    trainer._save_scaler(str(tmp_path))
    saved = trainer.accelerator.scaler.state_dict()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.state_dict() == saved


class Counter(TrainerCallback):
    """Something with a state, as an average of the weights has it."""

    def __init__(self):
        self.count, self.sum = 0, torch.zeros(3)

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1
        self.sum = self.sum + self.count

    def state(self):
        return {"count": self.count, "sum": self.sum}

    def load_state(self, state):
        self.count, self.sum = state["count"], state["sum"]


def test_further_states_are_kept(tmp_path):
    def with_counter():
        trainer, counter = tiny_run(tmp_path, **WARM_START), Counter()
        trainer.kept["counter"] = counter
        trainer.callback_handler.callbacks.insert(0, counter)
        return trainer, counter

    trainer, _ = with_counter()
    trainer.add_callback(DiesAt(7))
    with pytest.raises(Killed):
        trainer.train()
    resumed, counter = with_counter()
    resumed.train(resume_from_checkpoint=True)
    assert counter.count == 8 and torch.equal(counter.sum, torch.full((3,), 36.0))
    with pytest.raises(ValueError, match="counter: it is off, but was on in .*checkpoint-8'; set it as it was"):
        tiny_run(tmp_path, **WARM_START).train(resume_from_checkpoint=True)


# Which checkpoint


def names_of(folder):
    return [path.name for path in checkpoints_in(folder / "run").values()]


def copied(whole, folder, *steps):
    """The checkpoints of those steps in the folder of another run."""
    for step in steps:
        shutil.copytree(Path(whole.args.output_dir) / f"checkpoint-{step}", folder / "run" / f"checkpoint-{step}")
    return folder


@pytest.fixture
def three(whole, tmp_path):
    """The arguments of a run that has three checkpoints."""
    return tiny_run(copied(whole, tmp_path, 2, 8, 10)).args


def resume(arguments, wanted):
    arguments.resume_from_checkpoint = wanted
    return checkpoint_to_resume(arguments)


def test_the_newest_whole_checkpoint_is_taken(three, caplog):
    folder = Path(three.output_dir)
    assert resume(three, "true") == resume(three, "auto") == str(folder / "checkpoint-10")
    path = folder / "checkpoint-10" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "checkpoint-8" / "optimizer.json").unlink()
    caplog.clear()
    assert resume(three, "true") == str(folder / "checkpoint-2")
    first, second = [record.getMessage() for record in caplog.records]
    assert "checkpoint-10 is not whole (model.safetensors has " in first
    assert "checkpoint-8 is not whole (optimizer.json is missing); taking the one before it" in second


def test_without_a_whole_checkpoint_true_is_an_error_and_auto_a_new_start(three, tmp_path):
    folder = Path(three.output_dir)
    for step in (2, 8, 10):
        (folder / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in '.*' is whole \(checkpoint-10: no manifest.*start anew$"):
        resume(three, "true")
    assert resume(three, "auto") is None
    three.output_dir = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint in '.*nowhere'; leave it out to start anew$"):
        resume(three, "true")
    assert resume(three, "auto") is None


def test_a_torn_checkpoint_that_is_named_is_an_error(three):
    folder = Path(three.output_dir) / "checkpoint-8"
    assert resume(three, str(folder)) == str(folder)
    (folder / "scheduler.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-8' is not whole \(scheduler.json has 2 bytes of .*pass true"):
        resume(three, str(folder))


def test_a_new_start_among_old_checkpoints_is_warned_of(three, caplog):
    assert resume(three, None) is None
    assert "has checkpoints of an earlier run, up to checkpoint-10" in caplog.text


def test_going_back_among_later_checkpoints_is_warned_of(three, caplog):
    newest = str(Path(three.output_dir) / "checkpoint-10")
    assert resume(three, newest) == newest and caplog.text == ""
    resume(three, str(Path(three.output_dir) / "checkpoint-8"))
    assert "has checkpoints after checkpoint-8, up to checkpoint-10, which true and auto would take" in caplog.text


@pytest.mark.slow
def test_a_scheduler_that_watches_figures_is_kept(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}, "save_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "stages": ["warm_start"], "max_steps": 7}
    settings |= {"learning_rate": 0.3}  # so that it gets worse
    whole = tiny_run(tmp_path, **settings)
    whole.train()
    assert len({entry["learning_rate"] for entry in curve(whole) if "loss" in entry}) > 1
    for step in (1, 5):
        resumed = tiny_run(tmp_path, **settings)
        resumed.train(str(tmp_path / "run" / f"checkpoint-{step}"))
        assert curve(resumed) == curve(whole)


def test_what_is_not_whole_goes_when_there_is_a_newer_whole_one(tmp_path, whole):
    copied(whole, tmp_path, 2, 6, 10)
    for step in (2, 10):
        (tmp_path / "run" / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
    killed_at(tmp_path, 9)
    # the one of step 10 is of a run that was ahead of this one
    assert names_of(tmp_path) == ["checkpoint-6", "checkpoint-8", "checkpoint-10"]


# Other settings


def test_a_finished_run_trains_no_more(tmp_path, whole):
    again = to_the_end(copied(whole, tmp_path, 13))
    assert_same(again, whole)
    assert again.state.global_step == again._initial_global_step == 13
    assert names_of(tmp_path) == ["checkpoint-13"]
    assert to_the_end(tmp_path, max_steps=14).state.global_step == 14  # unless it is to be longer


class Readings(TrainerCallback):
    """Gives every evaluation the next of some readings."""

    def __init__(self, readings):
        self.readings = iter(readings)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_fve"] = next(self.readings)


def test_early_stopping_goes_on_counting_and_stays_stopped(tmp_path):
    def run(readings, dies_at=None):
        trainer = tiny_run(
            tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="fve", greater_is_better=True,
            resume_from_checkpoint="auto", **(WARM_START | {"max_steps": 12}),
        )  # fmt: skip
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        trainer.callback_handler.callbacks.insert(0, Readings(readings))
        if dies_at is not None:
            trainer.add_callback(DiesAt(dies_at))
        resume = checkpoint_to_resume(trainer.args)
        if dies_at is None:
            trainer.train(resume)
            return trainer.state.global_step
        with pytest.raises(Killed):
            trainer.train(resume)

    run([0.5, 0.4, 0.3], dies_at=7)
    assert run([0.2, 0.1]) == 8
    assert run([]) == 8


def test_another_stage_at_the_same_step_is_an_error(tmp_path, whole):
    copied(whole, tmp_path, 6)
    with pytest.raises(ValueError, match="stages: step 6 lay in stage 2 in .*checkpoint-6', and lies in stage 1 by"):
        to_the_end(tmp_path, stages=["warm_start 7s", "gumbel 1s", "policy_gradient"])


def test_what_cannot_be_exact_is_warned_of(tmp_path, whole, caplog):
    copied(whole, tmp_path, 10)
    to_the_end(tmp_path, max_steps=14, seed=3, per_device_train_batch_size=6, logging_steps=1, tau="0.5")
    warnings = [record.getMessage() for record in caplog.records if "resumed with" in record.getMessage()]
    assert warnings == [
        "resumed with rows per step 6 (were 8): some rows of this epoch are read twice, or not at all",
        "resumed with max_steps 14 (was 13)",
        "resumed with seed 3 (was 42)",
        "resumed with tau ['0.5'] (was ['1'])",
    ]


# Full disks


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    trainer = tiny_run(tmp_path, save_total_limit=1)
    trainer.add_callback(Full())
    try:
        with pytest.raises(
            CheckpointWriteError, match="cannot write .*checkpoint-6': File too large; those"
        ) as failed:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(failed.value)
    assert names_of(tmp_path) == ["checkpoint-4"]
    assert_same(to_the_end(tmp_path, save_total_limit=1), whole)
