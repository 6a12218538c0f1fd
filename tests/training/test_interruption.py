"""A run that is asked to go by a signal saves where it is, says so, and is the same run when it goes on."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from checkpoint_runs import curve, tensors, tiny_run
from transformers import TrainerCallback

from consistency_lens.checkpoints.resuming import checkpoint_to_resume
from consistency_lens.checkpoints.states import checkpoints_in
from consistency_lens.training import interruption as module
from consistency_lens.training.interruption import Interruption, RunInterrupted, interruptible


class Asked(TrainerCallback):
    """Sends the process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def train(trainer, *callbacks):
    """Trains as a recipe does."""
    with interruptible(trainer.args) as interruption:
        for callback in (*callbacks, interruption):
            trainer.add_callback(callback)
        trainer.train(checkpoint_to_resume(trainer.args))
        interruption.raise_if_received()
    return trainer


@pytest.fixture
def handlers():
    """The handlers of before, which have to be there again."""

    def ignore(*_):
        raise AssertionError("the signal came while nobody handled it")

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield ignore
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(found.values()) == {ignore}


def left(folder):
    return json.loads((folder / "run" / "interrupted.json").read_text())


EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "stages": ["warm_start"]}
BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "fve",
    "save_total_limit": 1, "stages": ["warm_start"],
}  # fmt: skip


class Readings(TrainerCallback):
    """The first evaluation is the best."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_fve"] = -state.global_step


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (3, {"gradient_accumulation_steps": 2}),
        (9, EPOCHS),  # the last step of an epoch: what belongs to its end is done first
        pytest.param(4, EPOCHS, marks=pytest.mark.slow),
        pytest.param(5, BEST, marks=pytest.mark.slow),
    ],
    ids=["steps", "epoch_end", "within_epoch", "best"],
)
def test_a_run_that_is_asked_to_go_saves_at_the_end_of_the_step(tmp_path, handlers, step, settings):
    settings = {"max_steps": 11, "resume_from_checkpoint": "auto", **settings}
    whole = train(tiny_run(tmp_path / "whole", **settings), Readings())
    message = f"interrupted by SIGTERM at step {step}; go on with --resume_from_checkpoint .*checkpoint-{step}$"
    with pytest.raises(RunInterrupted, match=message):
        train(tiny_run(tmp_path / "asked", **settings), Readings(), Asked(step))
    checkpoint = tmp_path / "asked" / "run" / f"checkpoint-{step}"
    assert left(tmp_path / "asked") == {"step": step, "signal": "SIGTERM", "checkpoint": str(checkpoint)}
    assert list(checkpoints_in(checkpoint.parent).values())[-1] == checkpoint
    resumed = train(tiny_run(tmp_path / "asked", **settings), Readings())
    assert curve(resumed) == curve(whole)
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(resumed)[name]), name
    assert not (tmp_path / "asked" / "run" / "interrupted.json").exists()


def test_it_saves_all_that_it_needs_whatever_else_is_saved(tmp_path, handlers):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "fve"}
    settings |= {"save_strategy": "best", "save_only_model": True, "resume_from_checkpoint": "auto"}
    settings |= {"greater_is_better": True, "stages": ["warm_start"]}

    def trainer(folder):
        made = tiny_run(folder, **settings)
        made.callback_handler.callbacks.insert(0, Readings())
        return made

    whole = train(trainer(tmp_path / "whole"))
    with pytest.raises(RunInterrupted, match="at step 3; go on with .*checkpoint-3$"):
        train(trainer(tmp_path / "asked"), Asked(3))
    assert curve(train(trainer(tmp_path / "asked"))) == curve(whole)


class AllAsked(TrainerCallback):
    """Sends a signal to the workers of the data loader too, as a launcher does that signals a group of processes."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == 3:
            workers = psutil.Process().children()
            assert workers
            processes = " ".join(str(process.pid) for process in (*workers, psutil.Process()))
            # from outside: workers take it in another way from the process that they work for
            subprocess.run(["sh", "-c", f"kill -TERM {processes}"], check=True)
            time.sleep(0.1)


def test_workers_of_the_data_loader_outlive_the_signal(tmp_path, handlers):
    trainer = tiny_run(tmp_path, dataloader_num_workers=1, dataloader_prefetch_factor=1)
    with pytest.raises(RunInterrupted, match="at step 3"):
        train(trainer, AllAsked())
    assert psutil.Process().children() == []


def test_two_ways_to_save_at_sigterm_are_one_too_many(tmp_path):
    trainer = tiny_run(tmp_path)
    trainer.args.enable_jit_checkpoint = True
    with pytest.raises(ValueError, match="enable_jit_checkpoint: .*; set it to false"), interruptible(trainer.args):
        pass


def test_sigusr1_and_a_signal_in_the_last_step(tmp_path, handlers):
    trainer = tiny_run(tmp_path, max_steps=9)
    with pytest.raises(RunInterrupted, match="SIGUSR1 outside the training"):
        train(trainer, Asked(9, signal.SIGUSR1))
    assert left(tmp_path) == {"step": 9, "signal": "SIGUSR1", "checkpoint": None}
    assert list(checkpoints_in(tmp_path / "run"))[-1] == 9


class AskedLast(TrainerCallback):
    """Sends the process a signal in the evaluation behind the last step."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_last_evaluation_loses_nothing(tmp_path, handlers):
    settings = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"stages": ["warm_start"], "resume_from_checkpoint": "auto"}
    with pytest.raises(RunInterrupted, match="outside the training"):
        train(tiny_run(tmp_path, **settings), AskedLast())
    assert list(checkpoints_in(tmp_path / "run")) == [2]
    # had it begun anew, it would be asked again
    assert train(tiny_run(tmp_path, **settings), AskedLast()).state.global_step == 2


def test_before_the_training_a_signal_ends_the_run_at_once(tmp_path, handlers):
    trainer = tiny_run(tmp_path)
    with pytest.raises(RunInterrupted, match="outside the training"), interruptible(trainer.args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not at once")
    assert left(tmp_path) == {"step": 0, "signal": "SIGTERM", "checkpoint": None}


def test_the_same_signal_twice_is_one_and_a_second_ends_the_process(monkeypatch):
    interruption, now, killed = Interruption(), [100.0], []
    interruption.training = True
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: killed.append(handler))
    monkeypatch.setattr(module.os, "kill", lambda process, number: killed.append(number))
    interruption.handle(signal.SIGTERM, None)
    now[0] += 4
    interruption.handle(signal.SIGTERM, None)
    assert killed == []
    now[0] += 2
    interruption.handle(signal.SIGTERM, None)
    assert killed == [signal.SIG_DFL, signal.SIGTERM]


def test_a_child_process_ends_as_if_nothing_handled_the_signal(handlers):
    child = os.fork()
    if child == 0:
        interruption = Interruption()
        interruption.process += 1  # it was made by the parent
        signal.signal(signal.SIGTERM, interruption.handle)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_another_thread_than_the_main_one_leaves_the_handlers_alone(tmp_path, handlers):
    trainer, found = tiny_run(tmp_path), []

    def work():
        with interruptible(trainer.args):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [handlers]


def test_the_cost_of_agreeing_is_nothing_for_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    assert not Interruption().agreed(tiny_run(tmp_path).args)


def test_what_an_interruption_leaves_is_removed_by_a_run_that_ends(tmp_path, handlers):
    args = tiny_run(tmp_path).args
    path = Path(args.output_dir) / "interrupted.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="broken"), interruptible(args):
        raise ValueError("broken")
    assert path.exists()
    with interruptible(args):
        pass
    assert not path.exists()
