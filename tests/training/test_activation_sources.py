"""Training on each of the three sources of activations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lens_runs import tiny_trainer
from test_trainer import losses, parameters

from consistency_lens import cached_passes

TERMS = ("loss", "ce", "mse", "kl", "policy", "lm", "entropy")
RUNS = {
    "warm_start": {"stages": ["warm_start"], "own_share": 0.5},
    "gumbel": {"stages": ["gumbel"]},
    "delta_residual": {"stages": ["gumbel"], "delta_residual": "full"},
    "own_pass": {"stages": ["gumbel"], "delta_residual": "detached", "pair_in_batch": False},
    "policy_gradient": {"stages": ["policy_gradient"], "reward": "-kl", "group_size": 3},
    "accumulation": {"stages": ["warm_start 2s", "gumbel"], "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("run", RUNS)
def test_on_the_fly_and_cached_training_give_the_same_losses(tmp_path, run):
    cached, on_the_fly = (
        tiny_trainer(tmp_path / source, source=source, max_steps=4, lm_reference="subject", **RUNS[run])
        for source in ("cache", "on_the_fly")
    )
    cached.train()
    on_the_fly.train()
    compared = 0
    for entry, other in zip(cached.state.log_history, on_the_fly.state.log_history, strict=True):
        for term in TERMS:
            assert entry.get(term) == pytest.approx(other.get(term), abs=1e-5)
            compared += term in entry
        assert entry.get("grad_norm") == pytest.approx(other.get("grad_norm"), abs=1e-3)
    assert compared >= 8


@pytest.mark.parametrize("source", ["cache", "on_the_fly"])
def test_rows_read_together_give_the_losses_of_rows_read_alone(tmp_path, source):
    runs, contexts = [], []
    for share in (True, False):
        arguments = {"stages": ["gumbel"], "lm_reference": "subject", "positions_together": 3, "share_contexts": share}
        trainer = tiny_trainer(tmp_path / str(share), source=source, max_steps=4, **arguments)
        contexts.append([len(batch["input_ids"]) for batch in trainer.get_train_dataloader()])
        trainer.train()
        runs.append(trainer.state.log_history)
    # eight rows of three documents, one of which may lie across the border of a batch
    assert max(contexts[0]) <= 4 and set(contexts[1]) == {8}
    for entry, other in zip(*runs, strict=True):
        for term in TERMS:
            assert entry.get(term) == pytest.approx(other.get(term), abs=1e-5)
        assert entry.get("grad_norm") == pytest.approx(other.get("grad_norm"), abs=1e-3)


@pytest.mark.parametrize("source", ["cache", "on_the_fly"])
def test_passes_by_length_give_the_losses_of_one_pass(tmp_path, source, monkeypatch):
    monkeypatch.setattr(cached_passes, "PASS_COST_ON_CPU", 1)
    runs, passes = [], []
    for divide in (True, False):
        arguments = {"stages": ["warm_start 2s", "gumbel"], "lm_reference": "subject", "passes_by_length": divide}
        trainer = tiny_trainer(tmp_path / str(divide), source=source, max_steps=5, **arguments)
        passes.append([len(batch.get("context_passes", [None])) for batch in trainer.get_train_dataloader()])
        trainer.train()
        runs.append(trainer.state.log_history)
    assert min(passes[0]) > 1 and set(passes[1]) == {1}
    for entry, other in zip(*runs, strict=True):
        for term in TERMS:
            assert entry.get(term) == pytest.approx(other.get(term), abs=1e-5)
        assert entry.get("grad_norm") == pytest.approx(other.get("grad_norm"), abs=1e-3)


@pytest.mark.parametrize(("share", "divide"), [(True, True), (True, False), (False, True)])
def test_processes_that_share_the_weights_make_as_many_passes(tmp_path, monkeypatch, share, divide):
    monkeypatch.setattr(cached_passes, "PASS_COST_ON_CPU", 1)
    trainer = tiny_trainer(tmp_path, source="on_the_fly", share_contexts=share, passes_by_length=divide)
    monkeypatch.setattr(type(trainer.weights), "spread", True)
    assert not any("context_passes" in batch for batch in trainer.get_train_dataloader())


@pytest.mark.parametrize("source", ["cache", "on_the_fly"])
def test_contexts_of_similar_length_have_less_padding(tmp_path, source):
    tokens = []
    for window in (0, 9):
        arguments = {"stages": ["warm_start"], "share_contexts": False, "length_window": window}
        trainer = tiny_trainer(tmp_path / str(window), source=source, **arguments)
        batches = list(trainer.get_train_dataloader())
        assert sorted(row for batch in batches for row in batch["rows"].tolist()) == list(range(72))
        tokens.append(sum(batch["input_ids"].numel() for batch in batches))
    lengths = trainer.train_dataset.source.lengths
    assert lengths.sum() == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert tokens[1] < 1.1 * lengths.sum() < tokens[0]


@pytest.mark.parametrize(("name", "value"), [("positions_together", 3), ("length_window", 2)])
def test_rows_of_a_stream_have_an_order_of_their_own(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, but only rows of a cache"):
        tiny_trainer(tmp_path, source="stream", **{name: value})


def test_the_kl_of_activations_on_the_fly_takes_no_second_pass_over_the_context(tmp_path, monkeypatch):
    for source in ("cache", "on_the_fly"):
        trainer = tiny_trainer(tmp_path / source, source=source, max_steps=3, stages=["gumbel"], lm_weight="0")
        subject, passes = trainer.lens.subject, []
        subject.check_one_token(64)
        hook = subject.model.register_forward_pre_hook(
            lambda _, args, kwargs, passes=passes: passes.append(
                (kwargs["input_ids"].shape[1], kwargs.get("position_ids") is not None)
            ),
            with_kwargs=True,
        )
        trainer.train()
        hook.remove()
        # a step: the contexts once, then one token of each of the three activations at most that share one, with A
        # where the context pass has ended before it came to that, and with the reconstruction
        for _ in range(3):
            (context, replaced), queries = passes.pop(0), passes[0][0]
            again = queries * (subject.stream.num_layers - 1 - subject.layer) < context
            assert not replaced and 1 <= queries <= 3
            assert [passes.pop(0) for _ in range(1 + again)] == [(queries, True)] * (1 + again)
        assert passes == []


def test_stages_without_a_kl_stop_the_subject_at_the_layer(tmp_path):
    trainer = tiny_trainer(tmp_path, source="on_the_fly", max_steps=2, stages=["warm_start"])
    subject, ran = trainer.lens.subject, []
    subject.stream.blocks[-1].register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    assert ran == []


@pytest.mark.parametrize("source", ["on_the_fly", "stream"])
def test_a_resumed_run_goes_on_at_the_very_row(tmp_path, source):
    """An epoch has nine steps of eight rows; the run is cut in the middle of one."""
    arguments = {"stages": ["warm_start"], "source": source, "max_steps": 12}
    whole = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, **arguments)
    seen = rows_seen(whole)
    whole.train()
    assert len({row for batch in seen[:9] for row in batch}) == 72
    for step in (2, 7):
        resumed = tiny_trainer(tmp_path, **arguments)
        seen_again = rows_seen(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert seen_again == seen[step:]
        assert losses(resumed)[step:] == losses(whole)[step:]
        for name, tensor in parameters(whole).items():
            assert torch.equal(tensor, parameters(resumed)[name]), name


def rows_seen(trainer):
    """A list that fills with the rows of each batch."""
    seen, compute_loss = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen.append(tuple(inputs["rows"].tolist()))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    return seen


def test_a_second_epoch_of_a_stream_has_another_order(tmp_path):
    trainer = tiny_trainer(tmp_path, source="stream", stages=["warm_start"], max_steps=18)
    seen = rows_seen(trainer)
    trainer.train()
    first, second = seen[:9], seen[9:]
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(72))
    assert first != second


def test_a_stream_is_not_read_by_workers(tmp_path):
    with pytest.raises(ValueError, match="dataloader_num_workers: got 1, but a stream loads ahead by itself"):
        tiny_trainer(tmp_path, source="stream", dataloader_num_workers=1)


PROCESSES = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
from lens_runs import tiny_trainer
from test_activation_sources import rows_seen
folder, source = Path(sys.argv[1]), sys.argv[3]
settings = {"stages": ["warm_start"], "source": source, "per_device_train_batch_size": 4}
settings |= {"max_steps": 14, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 7}
seen = []
for checkpoint in (None, str(folder / "run" / "checkpoint-7")):
    trainer = tiny_trainer(folder, **settings)
    rows = rows_seen(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    seen.append(rows)
(folder / f"rows{trainer.args.process_index}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cache", "on_the_fly", "stream"])
def test_two_processes_resume_in_the_second_epoch_at_the_very_row(tmp_path, source):
    """An epoch has nine batches of each process, hence five steps: step 7 is in the second."""
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    arguments = [str(tmp_path), f"{here}:{here.parent}", source]
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"rows{rank}.json").read_text()) for rank in (0, 1)]
    for whole, resumed in seen:
        assert len(whole) == 9 + 9 + 8 and resumed == whole[9 + 4 :]
    first_epoch = [row for whole, _ in seen for batch in whole[:9] for row in batch]
    assert sorted(first_epoch) == list(range(72))
