import json

import numpy as np
import pytest
import torch
from lens_runs import tiny_trainer
from transformers import TrainerCallback

from consistency_lens.data.activation_source import ActivationRows

TERMS = ("ce", "mse", "kl", "lm", "entropy", "tau", "kl_weight", "mse_weight", "samples_per_second")


class KeepGradients(TrainerCallback):
    """The gradients of every step, before the optimizer sees them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.lens.trained_tensors().items()}


LORA = {"training": "lora", "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
CLONES = [{"training": "full"}, {"training": "frozen"}, LORA]


@pytest.mark.parametrize("stages", [["warm_start"], ["warm_start 2s", "policy_gradient"]], ids=len)
@pytest.mark.parametrize("clones", CLONES, ids=lambda clones: clones["training"])
def test_every_trained_tensor_moves_and_the_subject_does_not(tmp_path, clones, stages):
    # two steps: LoRA's first matrices have no gradient before its second ones, which start at zero, have moved
    trainer = tiny_trainer(tmp_path, clones, max_steps=4, stages=stages, learning_rate=1e-2)
    before = parameters(trainer)
    subject_before = {n: p.clone() for n, p in trainer.lens.subject.model.named_parameters()}
    trainer.train()
    still = [n for n, t in parameters(trainer).items() if "normaliser" not in n and torch.equal(t, before[n])]
    assert still == []
    assert all(torch.equal(p, subject_before[n]) for n, p in trainer.lens.subject.model.named_parameters())


@pytest.mark.parametrize("stages", [["warm_start"], ["gumbel"], ["warm_start 3s", "gumbel"], ["policy_gradient"]])
def test_stages_log_their_terms(tmp_path, stages):
    trainer = tiny_trainer(tmp_path, stages=stages, lm_reference="subject")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    names = set(entries[-1])
    assert {"samples_per_second", "tokens_per_second", "peak_memory_gb", "learning_rate_encoder_base", "tau"} <= names
    expected = {
        "warm_start": {"ce", "mse", "ce_weight", "mse_own_text"},
        "gumbel": {"kl", "lm", "mse", "entropy", "kl_weight"},
        "policy_gradient": {"policy", "lm", "mse", "entropy", "reward_spread", "zero_advantage_share"},
    }
    assert expected[stages[-1]] <= names
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in entries)


def test_the_error_of_own_text_is_a_mean_over_the_rows_that_read_one(tmp_path):
    """However the rows are cut into micro-batches, of which some have none of them."""
    logged = []
    for name, size in (("whole", 8), ("cut", 1)):
        trainer = tiny_trainer(
            tmp_path / name, max_steps=3, logging_steps=3, stages=["warm_start"], own_share=0.3, learning_rate=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        trainer.train()
        logged.append(trainer.state.log_history[0])
    whole, cut = logged
    for of in ("mse_own_text", "mse_true_text", "mse"):
        assert cut[of] == pytest.approx(whole[of], rel=1e-4), of


def test_what_no_row_has_read_has_no_error(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, stages=["warm_start"], own_share=0.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["mse_true_text"] == pytest.approx(entry["mse"])
    assert "mse_own_text" not in entry


def test_warm_start_learns_the_tails(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=60, stages=["warm_start"], learning_rate=3e-3)
    trainer.train()
    first, last = losses(trainer)[0], losses(trainer)[-1]
    assert last < 0.7 * first


def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=1, stages=["gumbel"], lm_reference="subject", kl_weight="0.5", lm_weight="0.25",
        mse_weight="2", entropy_weight="0.125",
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    expected = 0.5 * entry["kl"] + 0.25 * entry["lm"] + 2 * entry["mse"] - 0.125 * entry["entropy"]
    assert entry["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("delta_residual", ["detached", "full"])
def test_delta_residual_judges_the_shifted_reconstruction(tmp_path, delta_residual):
    keep = KeepGradients()
    trainer = tiny_trainer(
        tmp_path, max_steps=1, stages=["gumbel"], lm_reference="subject", lm_weight="0", mse_weight="0", kl_weight="1",
        delta_residual=delta_residual,
    )  # fmt: skip
    trainer.add_callback(keep)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0
    # Â - Â' does not feel a common shift, so with the full gradient the encoder's output bias gets (almost) nothing
    bias = keep.steps[0]["encoder.output_map.bias"].abs().max()
    assert (bias < 1e-6) if delta_residual == "full" else (bias > 1e-6)


@pytest.mark.parametrize("delta_residual", ["none", "full"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, delta_residual):
    kept = []
    objective = {"stages": ["gumbel"], "lm_reference": "subject", "delta_residual": delta_residual}
    for name, settings in (("a", {}), ("b", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})):
        keep = KeepGradients()
        trainer = tiny_trainer(tmp_path / name, max_steps=1, **objective, **settings)
        trainer.add_callback(keep)
        trainer.train()
        kept.append(keep.steps[0])
    for name, gradient in kept[0].items():
        torch.testing.assert_close(gradient, kept[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_speed_is_of_the_samples_and_tokens_since_the_last_log(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.rates, trainer.optimizer = {"decoder_base": 1e-3}, object()
    batch = next(iter(trainer.get_train_dataloader()))
    for _ in range(2):
        trainer.count(batch)
        trainer.remember({"mse": 1.0})
    since, logs = trainer._since[2], {"loss": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: since + 4)
    trainer.log(logs)
    assert logs["samples_per_second"] == 2 * 8 / 4 and logs["mse"] == 1
    assert logs["tokens_per_second"] == 2 * (batch["input_ids"].numel() + 8 * 3) / 4  # contexts, and texts of three


def test_each_stage_may_have_its_own_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, stages=["warm_start 3s", "policy_gradient"], mse_weight=["0.5", "linear 1 -> 0"])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [round(entry["mse_weight"], 3) for entry in entries] == [0.5] * 3 + [1, 0.667, 0.333]


def test_a_schedule_starts_anew_with_each_stage(tmp_path):
    trainer = tiny_trainer(
        tmp_path, stages=["warm_start 3s", "gumbel"], mse_weight="linear 1 -> 0",
        learning_rate_schedule=["linear 1 -> 0.1", "constant 0.5"],
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [round(entry["mse_weight"], 3) for entry in entries] == [1, 0.667, 0.333] * 2
    assert entries[-1]["learning_rate_decoder_base"] == pytest.approx(0.5e-3)


def test_groups_have_their_own_rates(tmp_path):
    trainer = tiny_trainer(tmp_path, encoder_learning_rate=5e-3, projection_learning_rate=7e-3, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {
        "decoder_base": 1e-3, "encoder_base": 5e-3, "decoder_projections": 7e-3, "encoder_projections": 7e-3,
        "decoder_prompts": 7e-3, "encoder_prompts": 7e-3,
    }  # fmt: skip
    counted = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in trainer.lens.parameters() if p.requires_grad)


def test_nonfinite_gradients_are_skipped_and_counted(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, stages=["warm_start"])
    before = parameters(trainer)

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step < 2:
                model.encoder.output_map.weight.grad[0, 0] = float("nan")
                moved = [n for n, t in parameters(trainer).items() if not torch.equal(t, before[n])]
                assert moved == []  # nothing has moved up to here

    trainer.callback_handler.callbacks.insert(0, Poison())
    trainer.train()
    assert trainer.skipper.skipped == 2
    assert trainer.state.log_history[2]["skipped_steps"] == 2
    assert all(torch.isfinite(t).all() for t in parameters(trainer).values())
    assert any(not torch.equal(t, before[n]) for n, t in parameters(trainer).items())  # the third step was taken


def test_nothing_but_skipped_steps_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=10, stages=["warm_start"], max_nonfinite_steps=3)
    with torch.no_grad():
        trainer.lens.encoder.output_map.weight[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        trainer.train()


@pytest.mark.parametrize("clones", CLONES, ids=lambda clones: clones["training"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, clones):
    check_resuming(tmp_path, [2, 3, 4], clones, stages=["warm_start 3s", "gumbel 1s", "policy_gradient"])


def check_resuming(folder, steps, clones=None, **settings):
    """A run that goes on from the checkpoint of one of these steps is the one that was not disturbed."""
    whole = tiny_trainer(folder, clones, save_strategy="steps", save_steps=1, **settings)
    whole.train()
    for step in steps:
        resumed = tiny_trainer(folder, clones, **settings)
        resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        for name, tensor in parameters(whole).items():
            assert torch.equal(tensor, parameters(resumed)[name]), name
        if whole.warm_start_end is not None:
            assert resumed.warm_start_end.ends == whole.warm_start_end.ends


EARLY = {"stages": ["warm_start 6s", "gumbel 2s", "policy_gradient"], "warm_start_patience": 1}


@pytest.mark.parametrize(("readings", "length"), [([0.1, 0.3, 0.4], 6), ([0.3, 0.2], 4)])
def test_warm_start_ends_when_held_out_rows_are_read_no_better(tmp_path, readings, length):
    rates = ["constant 1", "constant 0.5", "constant 0.1"]
    trainer = tiny_trainer(tmp_path, max_steps=9, warm_start_check_steps=2, learning_rate_schedule=rates, **EARLY)
    coming = iter(readings)
    trainer.warm_start_end.held_out_fve = lambda: next(coming)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = [1] * length + [2] * 2 + [3] * (7 - length)
    assert [entry["stage"] for entry in entries] == expected
    factors = {1: 1e-3, 2: 0.5e-3, 3: 0.1e-3}
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([factors[stage] for stage in expected])
    assert [entry["learning_rate_decoder_base"] for entry in entries] == rates
    assert [entry["held_out_fve"] for entry in entries if "held_out_fve" in entry] == pytest.approx(readings)


def test_the_held_out_reading_is_the_fve_of_greedy_texts(tmp_path):
    trainer = tiny_trainer(tmp_path, **EARLY)
    activations, lens = trainer.warm_start_end.activations, trainer.lens
    reconstruction = lens.encode(lens.decode(activations).token_ids)
    error, variance = (activations - reconstruction).square().sum(), (activations - lens.mean).square().sum()
    assert trainer.warm_start_end.held_out_fve() == pytest.approx(float(1 - error / variance), abs=1e-5)
    lens.train()
    lens.encoder.eval()
    trainer.warm_start_end.held_out_fve()
    assert lens.decoder.training and not lens.encoder.training  # the modes are as they were


def test_all_stages_resume_though_warm_start_ended_early(tmp_path):
    """The check after step 4 may be in vain or not; either way the resumed run does the same."""
    settings = {**EARLY, "max_steps": 9, "warm_start_check_steps": 2, "learning_rate": 0.05}
    check_resuming(tmp_path, [1, 3, 5, 7], **settings)


def test_a_length_penalty_needs_a_stop_token(tmp_path):
    with pytest.raises(ValueError, match="length_penalty: got 0.1, but texts of this lens always have 3 tokens"):
        tiny_trainer(
            tmp_path / "a", stages=["warm_start 3s", "policy_gradient"], length_penalty=0.1, shorter_share=1.0
        )
    trainer = tiny_trainer(
        tmp_path / "b", {"stop_token_id": 2}, stages=["warm_start 3s", "policy_gradient"], length_penalty=0.1,
        shorter_share=1.0,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "text_length" in entry]
    assert len(entries) == 3 and any(entry["text_length"] < 3 for entry in entries)


def test_patience_may_not_change_at_a_resume(tmp_path):
    stages = ["warm_start 3s", "policy_gradient"]
    tiny_trainer(tmp_path, stages=stages, save_strategy="steps", save_steps=2, max_steps=4).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="warm_start_patience: it is on, but was off in"):
        tiny_trainer(tmp_path, stages=stages, warm_start_patience=1).train(resume_from_checkpoint=checkpoint)


def test_a_missing_reference_is_an_error(tmp_path):
    stages = ["warm_start 2s", "gumbel"]
    trainer = tiny_trainer(tmp_path, stages=stages, save_strategy="steps", save_steps=4)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reference.safetensors is missing"):
        tiny_trainer(tmp_path, stages=stages).train(resume_from_checkpoint=str(checkpoint))


def test_checkpoints_hold_no_pickle(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    files = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files and files <= {".safetensors", ".json", ".jinja", ".md"}
    for path in (tmp_path / "run").rglob("*.json"):
        json.loads(path.read_text())


def test_evaluate_gives_a_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, stages=["warm_start"])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_reference_is_at_first_the_decoder_itself(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, stages=["warm_start 1s", "gumbel"])
    trainer.train()
    assert trainer.state.log_history[1]["lm"] == pytest.approx(0, abs=1e-6)


PAIRED = {"stages": ["gumbel"], "lm_weight": "0", "delta_residual": "detached", "positions_together": 2}


def test_other_rows_have_an_order_of_their_own(tmp_path):
    trainer = tiny_trainer(tmp_path, **PAIRED)
    part = trainer.train_dataset.source.part(np.arange(48))
    trainer.train_dataset = ActivationRows(part)
    rows = [row for batch in trainer.get_train_dataloader() for row in batch["rows"].tolist()]
    assert sorted(rows) == list(range(48)) and trainer.steps_per_epoch() == 6


@pytest.mark.parametrize("settings", [{}, {"dataloader_drop_last": True}, PAIRED], ids=["all", "drop_last", "paired"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_epoch_has_the_steps_that_it_takes(tmp_path, settings, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1, "max_steps": -1, **settings}
    trainer = tiny_trainer(tmp_path, **{"stages": ["warm_start"], **settings})
    trainer.train()
    assert trainer.steps_per_epoch() == trainer.state.global_step


def test_checkpointing_gives_the_same_loss(tmp_path):
    plain = tiny_trainer(tmp_path / "a", max_steps=2, stages=["gumbel"], lm_reference="subject")
    plain.train()
    recomputed = tiny_trainer(
        tmp_path / "b", max_steps=2, stages=["gumbel"], lm_reference="subject", gradient_checkpointing=True
    )
    recomputed.train()
    assert recomputed.lens.train().decoder.checkpoints_gradients()  # it was on, and off in the other run
    assert not plain.lens.train().decoder.checkpoints_gradients()
    assert losses(plain) == pytest.approx(losses(recomputed), rel=1e-4)
