"""Groups, rates, unfreezing, averages, early stopping and best checkpoints, each through a run of the trainer."""

import pytest
import torch
from lens_runs import tiny_trainer
from safetensors.torch import load_file
from test_trainer import LORA, KeepGradients, check_resuming, losses, parameters
from transformers import TrainerCallback

from consistency_lens.training.parameter_groups import group_of

FULL = {"training": "full"}
CLONES = pytest.mark.parametrize("clones", [FULL, LORA], ids=lambda clones: clones["training"])


class KeepTensors(TrainerCallback):
    """The trained parameters after every step, the first entry before all."""

    def __init__(self, trainer):
        self.lens = trainer.lens
        self.steps = [self.tensors()]
        trainer.add_callback(self)

    def tensors(self):
        return {n: p.detach().clone() for n, p in self.lens.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, **kwargs):
        trained = self.steps[0]
        self.steps.append({n: p.detach().clone() for n, p in self.lens.named_parameters() if n in trained})

    def moved(self, step):
        """The groups of which a tensor moved in the step that follows `step` others."""
        before, after = self.steps[step : step + 2]
        return {group_of(name) for name in before if not torch.equal(before[name], after[name])}


def log_of(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


# --- unfreezing


def late_groups(clones):
    kind = "lora" if clones == LORA else "base"
    unfreeze = [f"decoder_{kind} 2s warmup 2s", f"encoder_{kind} 3s", "prompts 1s"]
    return kind, {"unfreeze": unfreeze, "weight_decay": 0.5, "max_steps": 5, "stages": ["warm_start"]}


@pytest.mark.parametrize("batches", [1, 2], ids=["one batch", "accumulation"])
@CLONES
def test_a_group_moves_from_its_step_on_and_no_sooner(tmp_path, clones, batches):
    kind, settings = late_groups(clones)
    settings |= {"gradient_accumulation_steps": batches, "per_device_train_batch_size": 8 // batches}
    trainer = tiny_trainer(tmp_path, clones, **settings)
    kept, gradients = KeepTensors(trainer), KeepGradients()
    trainer.add_callback(gradients)
    trainer.train()
    at_once = {"decoder_projections", "encoder_projections"}
    late = [set(), {"encoder_prompts", "decoder_prompts"}, {f"decoder_{kind}"}, {f"encoder_{kind}"}, set()]
    expected = [at_once.union(*late[: step + 1]) for step in range(5)]
    prompts = {group_of(name) for name in kept.steps[0]}  # the tiny encoder has no prompt that is trained
    assert [kept.moved(step) for step in range(5)] == [groups & prompts for groups in expected]
    # the clipping and the optimizer saw no gradient of theirs, and no moments were gathered
    assert [{group_of(name) for name in step} for step in gradients.steps] == [groups & prompts for groups in expected]
    names = {parameter: name for name, parameter in trainer.lens.named_parameters()}
    steps = {group_of(names[p]): int(state["step"]) for p, state in trainer.optimizer.state.items()}
    assert steps[f"decoder_{kind}"] == 3 and steps[f"encoder_{kind}"] == 2 and steps["decoder_projections"] == 5
    # its rate rises on its own, while that of the others falls over the run
    rates = log_of(trainer, f"learning_rate_decoder_{kind}", f"learning_rate_encoder_{kind}")
    of_run = [1e-3 * (5 - step) / 5 for step in range(5)]
    assert [decoder for decoder, _ in rates] == pytest.approx([0, 0, of_run[2] / 2, of_run[3], of_run[4]])
    assert [encoder for _, encoder in rates] == pytest.approx([0, 0, 0, of_run[3], of_run[4]])
    assert all(parameter.requires_grad for parameter in names if names[parameter] in kept.steps[0])


def test_standing_still_changes_nothing_else(tmp_path):
    """The gradients of the others in the first step are those of a run in which all groups train."""
    kept = []
    for name, unfreeze in (("late", ["base 1s"]), ("all", None)):
        trainer = tiny_trainer(tmp_path / name, max_steps=2, unfreeze=unfreeze, max_grad_norm=0)
        gradients = KeepGradients()
        trainer.add_callback(gradients)
        trainer.train()
        kept.append(gradients.steps[0])
    late, all_groups = kept
    assert {group_of(name) for name in all_groups.keys() - late.keys()} == {"decoder_base", "encoder_base"}
    for name, gradient in late.items():
        torch.testing.assert_close(gradient, all_groups[name], atol=1e-6, rtol=1e-4, msg=name)


# --- resuming


@CLONES
def test_a_resumed_run_unfreezes_clips_and_averages_as_an_undisturbed_one(tmp_path, clones):
    settings = late_groups(clones)[1] | {"ema_decay": 0.9, "group_max_grad_norm": {"projections": 0.01}}
    check_resuming(tmp_path, [1, 2, 4], clones, **settings)  # before, at and after the first; of the averages, too


EVERY_KIND = {
    "constant": "constant 0.5 warmup 2s from 0.1",
    "linear": "linear 1 -> 0.1 warmup 1s hold 1s",
    "cosine": "cosine 1 -> 0.1 over 50% warmup 0.3e",
    "restarts": "restarts 1 -> 0.1 every 2s times 2 warmup 1s",
    "polynomial": "polynomial 1 -> 0.1 power 2 hold 20%",
    "exponential": "exponential 1 -> 0.1 warmup 10%",
}


# what the kinds are is for `test_schedules`; here each of these takes a way of its own
OTHER_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "polynomial", "exponential")]


@pytest.mark.parametrize("kind", ["constant", "cosine", "restarts", *OTHER_KINDS])
def test_a_resumed_run_continues_every_schedule(tmp_path, kind):
    """The rates, the weights and the temperature of each step; the run is cut inside its second stage."""
    text = EVERY_KIND[kind]
    settings = {
        "max_steps": 8, "stages": ["warm_start 3s", "gumbel"], "learning_rate_schedule": [text, text],
        "mse_weight": text, "tau": text.replace("1s hold", "1s from 0.2 hold") if kind == "constant" else "1",
        "encoder_learning_rate": 3e-3,
    }  # fmt: skip
    whole = tiny_trainer(tmp_path, save_strategy="steps", save_steps=5, **settings)
    whole.train()
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    names = ("learning_rate", "learning_rate_decoder_base", "learning_rate_encoder_projections", "mse_weight", "tau")
    figures = log_of(whole, *names)
    assert log_of(resumed, *names) == figures
    timetable = whole.timetable()
    assert [rate for _, rate, *_ in figures] == pytest.approx([1e-3 * timetable.rate_factor(s) for s in range(8)])
    assert [weight for *_, weight, _ in figures] == pytest.approx(
        [timetable.scheduled("mse_weight", s) for s in range(8)]
    )
    assert len({rate for _, rate, *_ in figures[3:]}) > 1 or kind == "constant"


def test_a_resumed_run_continues_transformers_own_schedule(tmp_path):
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "unfreeze": ["base 4s warmup 2s"], "max_steps": 7}
    whole = tiny_trainer(tmp_path, save_strategy="steps", save_steps=5, **settings)
    whole.train()
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    names = ("learning_rate_decoder_base", "learning_rate_decoder_projections")
    assert log_of(resumed, *names) == log_of(whole, *names)
    base, projections = zip(*log_of(whole, *names), strict=True)
    assert projections[:4] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    assert base == pytest.approx([0] * 4 + [projections[4] / 2, *projections[5:]])


# --- clipping


def test_a_group_is_clipped_to_its_own_norm(tmp_path):
    gradients = KeepGradients()
    limits = ["encoder_base 0.01", "projections 0.02"]
    trainer = tiny_trainer(tmp_path, max_steps=1, group_max_grad_norm=limits, max_grad_norm=0.0)
    trainer.add_callback(gradients)
    trainer.train()
    plain, unclipped = tiny_trainer(tmp_path / "plain", max_steps=1, max_grad_norm=0.0), KeepGradients()
    plain.add_callback(unclipped)
    plain.train()

    def norms(step):
        groups = {group_of(name): [] for name in step}
        for name, gradient in step.items():
            groups[group_of(name)].append(gradient.flatten())
        return {group: float(torch.cat(parts).norm()) for group, parts in groups.items()}

    clipped, free = norms(gradients.steps[0]), norms(unclipped.steps[0])
    assert clipped["encoder_base"] == pytest.approx(0.01, rel=1e-3) and free["encoder_base"] > 0.1
    assert clipped["decoder_projections"] == pytest.approx(0.02, rel=1e-3)
    assert clipped["encoder_projections"] == pytest.approx(0.02, rel=1e-3)
    assert clipped["decoder_base"] == free["decoder_base"]  # max_grad_norm is off
    total = trainer.state.log_history[0]["grad_norm"]
    assert total == pytest.approx(plain.state.log_history[0]["grad_norm"], rel=1e-5)


# --- averages


def averaged_by_hand(kept, decay):
    """The average after each step, from the tensors after each step."""
    averages = [kept.steps[0]]
    for number, tensors in enumerate(kept.steps[1:]):
        d = min(decay, (1 + number) / (10 + number))
        averages.append({name: d * average + (1 - d) * tensors[name] for name, average in averages[-1].items()})
    return averages


class Judge(TrainerCallback):
    """What the lens held when the trainer evaluated."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


@CLONES
def test_averages_are_judged_and_saved_and_the_run_goes_on_with_its_own(tmp_path, clones):
    settings = {"stages": ["warm_start"], "learning_rate": 1e-2, "max_steps": 4}
    plain = tiny_trainer(tmp_path / "plain", clones, **settings)
    plain.train()
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path / "averaged", clones, ema_decay=0.2, **evaluated, **settings)
    kept, judge = KeepTensors(trainer), Judge()
    trainer.add_callback(judge)
    trainer.train()
    assert losses(trainer) == losses(plain)  # training does not notice
    by_hand = averaged_by_hand(kept, 0.2)
    final = parameters(trainer)
    checkpoint = tmp_path / "averaged" / "run" / "checkpoint-2"
    own, averages = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "ema.safetensors")
    assert own.keys() == averages.keys() == final.keys()
    for name, average in by_hand[-1].items():
        torch.testing.assert_close(final[name], average, msg=name)
        torch.testing.assert_close(judge.seen[1][name], average, msg=name)
        torch.testing.assert_close(judge.seen[0][name], by_hand[2][name], msg=name)
        torch.testing.assert_close(averages[name], by_hand[2][name], msg=name)
        assert torch.equal(own[name], kept.steps[2][name]), name
    assert any(not torch.equal(by_hand[-1][name], kept.steps[-1][name]) for name in by_hand[-1])
    settings = settings | evaluated | {"ema_decay": 0.0}
    with pytest.raises(ValueError, match="ema_decay: it is off, but was on in"):
        tiny_trainer(tmp_path / "averaged", clones, **settings).train(resume_from_checkpoint=str(checkpoint))


def test_averages_come_and_go_to_the_bit(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_decay=0.5)
    trainer.averages.start()
    kept = KeepTensors(trainer)
    with torch.no_grad():
        for average in trainer.averages.averages.values():
            average.add_(0.1)
    with pytest.raises(KeyError), trainer.averaged():
        assert all(not torch.equal(tensor, kept.steps[0][name]) for name, tensor in kept.tensors().items())
        raise KeyError
    assert all(torch.equal(tensor, kept.steps[0][name]) for name, tensor in kept.tensors().items())


def test_averages_of_half_precision_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_decay=0.5)
    trainer.lens.encoder.output_map.bfloat16()
    with pytest.raises(ValueError, match="ema_decay: trained tensors must be float32, encoder.output_map"):
        trainer.train()


# --- the reference that warm start leaves


@pytest.mark.parametrize(
    "settings",
    [{"unfreeze": ["decoder_base 4s"]}, {"ema_decay": 0.9, "eval_strategy": "steps", "eval_steps": 2}],
    ids=["unfreezing", "averages"],
)
def test_the_reference_is_the_decoder_as_it_was_when_its_stage_began(tmp_path, settings):
    trainer = tiny_trainer(tmp_path, FULL, stages=["warm_start 2s", "gumbel"], **settings)
    kept = KeepTensors(trainer)
    trainer.train()
    for name, tensor in trainer._reference.named_parameters():
        assert torch.equal(tensor, kept.steps[2][f"decoder.{name}"]), name


def test_a_second_training_leaves_a_reference_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, FULL, stages=["warm_start 2s", "gumbel"], max_steps=3)
    trainer.train()
    kept = KeepTensors(trainer)
    trainer.train()
    for name, tensor in trainer._reference.named_parameters():
        assert torch.equal(tensor, kept.steps[2][f"decoder.{name}"]), name
    assert trainer.objective_at(1).reference.decoder is trainer._reference


def test_a_second_training_reads_held_out_rows_anew(tmp_path):
    stages = {"stages": ["warm_start 4s", "gumbel"], "warm_start_patience": 1, "warm_start_check_steps": 1}
    trainer = tiny_trainer(tmp_path, FULL, max_steps=5, **stages)
    for readings, ends in (([0.4, 0.3], {0: 2}), ([0.1, 0.2, 0.3, 0.4], {})):
        coming = iter(readings)
        trainer.warm_start_end.held_out_fve = lambda coming=coming: next(coming)
        trainer.train()
        assert trainer.warm_start_end.ends == ends


# --- best checkpoints and early stopping


class Figures(TrainerCallback):
    """Stands for an evaluator: one figure after the other, logged and handed to the trainer as `EvaluateLens` does."""

    def __init__(self, trainer, name, figures):
        self.trainer, self.name, self.figures = trainer, f"eval_{name}", figures
        trainer.callback_handler.callbacks.insert(0, self)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics[self.name] = self.figures[state.global_step - 1]
        self.trainer.log({self.name: metrics[self.name]})


MEASURED = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "stages": ["warm_start"],
    "per_device_eval_batch_size": 64,
}  # fmt: skip


def measured_trainer(folder, metric, figures, clones=None, **settings):
    trainer = tiny_trainer(folder, clones, **(MEASURED | {"metric_for_best_model": metric} | settings))
    Figures(trainer, metric, figures)
    return trainer


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (folder / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("metric", "limit", "kept"), [("fve", None, [1, 3, 6]), ("kl", None, [2, 4, 6]), ("fve", 2, [1, 3, 5, 6])]
)
def test_the_best_checkpoints_and_the_last_stay(tmp_path, metric, limit, kept):
    figures = [0.9, 0.1, 0.8, 0.2, 0.5, 0.4]
    trainer = measured_trainer(tmp_path, metric, figures, keep_best=2, save_total_limit=limit)
    trainer.train()
    assert checkpoints(tmp_path) == kept
    assert trainer.args.save_total_limit == limit


def test_the_checkpoint_that_a_run_goes_on_from_stays(tmp_path):
    figures = [0.9, 0.1, 0.8, 0.2, 0.5, 0.6]
    measured_trainer(tmp_path, "fve", figures, max_steps=4).train()
    resumed = measured_trainer(tmp_path, "fve", figures, keep_best=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert checkpoints(tmp_path) == [1, 2, 6]


def test_the_limit_of_checkpoints_keeps_the_last_and_the_best_that_is_to_be_loaded(tmp_path):
    settings = {"save_total_limit": 1, "load_best_model_at_end": True, "ema_decay": 0.5}
    trainer = measured_trainer(tmp_path, "kl", [3, 2, 1, 4, 5, 6], LORA, **settings)
    trainer.train()
    assert checkpoints(tmp_path) == [3, 6]
    best = load_file(tmp_path / "run" / "checkpoint-3" / "ema.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in parameters(trainer).items())


def test_frozen_tensors_are_not_missed_when_the_best_lens_is_loaded(tmp_path, caplog):
    trainer = measured_trainer(tmp_path, "fve", [3, 2], LORA, max_steps=2, load_best_model_at_end=True)
    trainer.train()
    assert not [record for record in caplog.records if "missing keys" in record.getMessage()]
    best = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in parameters(trainer).items())


STOPPING = {"early_stopping_patience": 2, "max_steps": 9}


@pytest.mark.parametrize(
    ("metric", "figures", "last"),
    [("fve", [1, 2, 3, 3, 3, 9, 9, 9, 9], 5), ("perplexity_ratio", [3, 2, 9, 1, 1.5, 2, 0, 0, 0], 6)],
)
def test_a_run_that_gets_no_better_ends(tmp_path, metric, figures, last):
    trainer = measured_trainer(tmp_path, metric, figures, **STOPPING)
    trainer.train()
    assert trainer.state.global_step == last
    for step in (last - 1, last):  # the evaluations in vain before the checkpoint count
        resumed = measured_trainer(tmp_path, metric, figures, **STOPPING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert resumed.state.global_step == last


def test_only_the_last_stage_ends_early(tmp_path):
    stages = {"stages": ["warm_start 4s", "policy_gradient"], "save_strategy": "no"}
    trainer = measured_trainer(tmp_path, "fve", [9, 8, 7, 6, 1, 2, 2, 1, 9], **STOPPING, **stages)
    trainer.train()
    assert trainer.state.global_step == 8


def test_an_unknown_metric_is_named(tmp_path):
    trainer = measured_trainer(tmp_path, "fve", [1], metric_for_best_model="fev", max_steps=1)
    with pytest.raises(ValueError, match="metric_for_best_model: no evaluation gives 'fev'; it is one of .*loss"):
        trainer.train()
