"""What a fit reads on held-out text, keeps, shows and writes."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import PrinterCallback
from tuned_trainers import LAYERS, SEQ_LEN, AtSteps, draw_blocks

from consistency_lens.checkpoints.states import CheckpointWriteError
from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens import trainer as trainer_module
from consistency_lens.tuned_lens.fit_arguments import TunedLensTrainingArguments
from consistency_lens.tuned_lens.held_out import HeldOutKL
from consistency_lens.tuned_lens.trainer import TunedLensTrainer

# held-out text

SAVED = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, "logging_steps": 1}
SAVED |= {"eval_steps": 1, "save_steps": 1, "max_steps": 4, "warmup_steps": 0.0}


def script_readings(monkeypatch, readings):
    """Has held-out text read as a script says: nats by step."""

    def held_out(trainer, layers, lenses, progress=False):
        value = torch.full((len(layers),), readings[trainer.state.global_step], dtype=torch.float64)
        return HeldOutKL({"tuned": value}, list(layers), 1)

    monkeypatch.setattr(TunedLensTrainer, "held_out", held_out)


@pytest.mark.parametrize(
    ("readings", "patience", "best", "last"),
    [
        ({0: 5, 1: 1, 2: 3, 3: 2}, 2, 1, 3),
        ({0: 5, 1: 1, 2: 3, 3: 2, 4: 1.1}, 0, 1, 4),
        ({0: 5, 1: 6, 2: 7}, 2, 0, 2),
        ({0: 5, 1: 6, 2: 4, 3: 4.5, 4: 2}, 2, 4, 4),
    ],
)
def test_the_best_reading_is_kept_and_patience_ends(make, monkeypatch, readings, patience, best, last):
    script_readings(monkeypatch, readings)
    trainer, states = make(early_stopping_patience=patience, **SAVED), {}
    trainer.add_callback(AtSteps(lambda step: states.update({step: copy.deepcopy(trainer.lens.state_dict())})))
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (last, best)
    for name, tensor in trainer.lens.state_dict().items():
        assert torch.equal(tensor, states[best][name]), name
    if last > best:
        assert not torch.equal(trainer.lens.translators[0].c, states[last]["translators.0.c"])


def test_a_reading_is_the_mean_kl_in_bits_at_three_depths(make):
    trainer = make(positions_per_sequence="all")
    metrics, lens = trainer.evaluate(), trainer.lens
    ids = torch.from_numpy(trainer.validation_blocks.astype(np.int64))
    residuals, final = lens.residuals(ids), lens.subject_model(ids).logits
    bits = [kl_divergence(final, lens.logits(k, residuals[k])).mean().item() / math.log(2) for k in range(LAYERS - 1)]
    expected = [bits[0], bits[2], bits[3]]  # of 5 blocks the 1st, 3rd and 4th
    assert [metrics[f"eval_kl_bits_{depth}"] for depth in (25, 50, 75)] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_kl_bits"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_several_processes_leave_out_a_pass_that_is_not_whole(make, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TunedLensTrainingArguments, "world_size", 2)
        trainer = make(blocks=draw_blocks(34))  # passes of 4 blocks twice on each of two
        with pytest.raises(ValueError, match="tokens: less than the 16 sequences of one pass of all processes"):
            make(blocks=draw_blocks(15))
    rows = [trainer.train_dataset[item]["row"] for item in range(len(trainer.train_dataset))]
    assert sorted(set(rows)) == list(range(32)) and len(rows) == 32 * trainer.steps_per_pass
    # a process has the same blocks at every step of a pass, which its cache depends on
    for start in range(0, len(rows), 16):
        first = start // (16 * trainer.steps_per_pass) * 16 * trainer.steps_per_pass
        assert rows[start : start + 16] == rows[first : first + 16]


def test_processes_share_the_held_out_text(make, monkeypatch):
    trainer = make(validation=draw_blocks(5, 1))
    whole = trainer.held_out(None, ("tuned", "norm"))
    monkeypatch.setattr(TunedLensTrainingArguments, "world_size", 2)
    parts = {0: [], 1: []}
    for index in parts:
        monkeypatch.setattr(TunedLensTrainingArguments, "process_index", index)
        monkeypatch.setattr(
            trainer.accelerator, "reduce", lambda tensor, reduction, index=index: parts[index].append(tensor) or tensor
        )
        trainer.held_out(None, ("tuned", "norm"))
    sums = [a + b for a, b in zip(parts[0], parts[1], strict=True)]
    torch.testing.assert_close(sums[0], whole.sums["tuned"], rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[1], whole.sums["norm"], rtol=1e-5, atol=0)
    assert int(sums[2]) == whole.positions and int(parts[0][2]) == 3 * SEQ_LEN


def test_a_kl_that_is_no_number_is_an_error_of_one_line(make, tmp_path):
    steep, message = (
        {"learning_rate": 1e30, "max_grad_norm": 0.0},
        "learning_rate: the KL is (nan|inf) at step .*; pass",
    )
    with pytest.raises(ValueError, match=message) as caught:
        make(**{**SAVED, **steep}).train()
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-0"]
    with pytest.raises(ValueError, match=message):
        make(max_steps=4, logging_steps=1, **steep).train()


# what is shown, and written


def test_the_bar_shows_bits_and_a_line_for_each_reading(make, capsys):
    make(**{**SAVED, "max_steps": 2, "disable_tqdm": False}).train()
    printed = capsys.readouterr()
    lines = [line.strip() for line in printed.out.splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines] == [f"step {step}, held out" for step in (0, 1, 2)]
    assert "at 25 %" in lines[0] and "at 75 %" in lines[0]
    assert "KL " in printed.err and " bits" in printed.err and "{" not in printed.out + printed.err


def test_without_a_bar_nothing_is_printed_and_a_reading_is_logged(make, capsys, caplog):
    caplog.set_level("INFO", "consistency_lens")
    trainer = make(**{**SAVED, "max_steps": 1})
    trainer.train()
    assert not capsys.readouterr().out
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"step {step}, held out" for step in (0, 1)]
    assert not any(isinstance(callback, PrinterCallback) for callback in trainer.callback_handler.callbacks)


def test_a_checkpoint_that_cannot_be_written_says_how_to_go_on(make, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer_module.states, "save_scheduler", full)
    with pytest.raises(CheckpointWriteError, match="No space left .* give the same command again"):
        make(**SAVED).train()
