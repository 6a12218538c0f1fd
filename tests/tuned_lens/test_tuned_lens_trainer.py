import copy
import math

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE
from torch.optim import AdamW, Muon
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tuned_trainers import LAYERS, SEQ_LEN, AtSteps, batch_of, draw_blocks, gradients, new_lens

from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens import trainer as trainer_module
from consistency_lens.tuned_lens.fit_arguments import TunedLensTrainingArguments
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens

# the schedule


def by_hand(step, total, warmup, rate=1e-3):
    if step < warmup:
        return rate * step / warmup
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_rates_that_are_used_are_warmed_up_and_go_to_0(make, name):
    used = {AdamW: [], Muon: []}

    def note(optimizer, *_):
        if type(optimizer) in used:
            used[type(optimizer)].append({group["lr"] for group in optimizer.param_groups})

    hook = register_optimizer_step_pre_hook(note)
    trainer = make(translator_optim=name, warmup_steps=0.1, max_steps=11)
    trainer.train()
    hook.remove()
    expected = [by_hand(step, 11, math.ceil(0.1 * 11)) for step in range(11)]
    assert expected[:3] == [0, 0.0005, 0.001] and trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)
    for kind in (AdamW, Muon) if name == "muon" else (AdamW,):
        assert all(len(rates) == 1 for rates in used[kind])
        assert [rate for rates in used[kind] for rate in rates] == pytest.approx(expected)


def test_steps_and_warm_up_of_the_plan(make):
    blocks = np.broadcast_to(np.zeros((1, SEQ_LEN), dtype=np.int32), (16_000_000 // 512, SEQ_LEN))
    trainer = make(blocks=blocks, per_device_train_batch_size=8, gradient_accumulation_steps=4, warmup_steps=0.1)
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert steps == math.ceil(16_000_000 / 512 / 32) == 977  # the plan's 975 is a slip: 31250 / 32 = 976.6
    assert trainer.args.get_warmup_steps(steps) == 98


# what is read


def test_tokens_are_those_that_went_through_the_subject(make):
    trainer, read = make(num_train_epochs=2, logging_steps=1), []

    def note(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == SEQ_LEN:  # a readout is checked on fewer
            read.append(kwargs["input_ids"].numel())

    trainer.lens.subject_model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert trainer.tokens == sum(read) == 2 * 18 * SEQ_LEN
    assert trainer.state.global_step == 6
    logged = [entry for entry in trainer.state.log_history if "tokens" in entry]
    assert [entry["tokens"] for entry in logged] == [blocks * SEQ_LEN for blocks in (8, 16, 18, 26, 34, 36)]
    assert all(entry["kl_bits"] == pytest.approx(entry["kl"] / math.log(2)) for entry in logged)


def test_the_kl_that_is_logged_is_the_mean_over_all_passes_since_the_last_one(make, monkeypatch):
    trainer, seen = make(learning_rate=0.0, logging_steps=2, max_steps=4), []
    forward = TunedLens.forward
    monkeypatch.setattr(TunedLens, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])
    trainer.train()
    means = [output.kl.mean().item() for output in seen]
    # 2, 2, 1 and 2 passes
    expected = [np.mean(means[:4]), np.mean(means[4:])]
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e] == pytest.approx(expected)


def test_the_loss_is_the_kl_of_the_models_logits(make):
    trainer = make(smallness=0.0, smoothness=0.0, positions_per_sequence="all")
    batch, lens = batch_of(trainer), trainer.lens
    residuals = lens.residuals(batch["input_ids"])
    final = lens.subject_model(batch["input_ids"]).logits
    kl = [kl_divergence(final, lens.logits(k, residuals[k])).mean().item() for k in range(LAYERS - 1)]
    assert trainer.compute_loss(lens, batch).item() == pytest.approx(np.mean(kl), rel=1e-4)


def test_positions_are_drawn_by_epoch_and_row(make, monkeypatch):
    drawn = []
    sample = trainer_module.sampled_positions

    def note(rows, count, bounds, seed, epoch):
        drawn.extend((epoch, row) for row in rows)
        return sample(rows, count, bounds, seed, epoch)

    monkeypatch.setattr(trainer_module, "sampled_positions", note)
    make(num_train_epochs=2).train()
    # a row's number is that of its block, whatever order they come in
    assert sorted(drawn) == [(epoch, row) for epoch in (0, 1) for row in range(18)] and drawn != sorted(drawn)


def test_steps_of_a_pass_share_out_its_positions(make):
    """The mean over the steps of a pass is the loss of the whole pass, and the subject runs once."""
    settings = {"smallness": 0.0, "smoothness": 0.0, "positions_per_sequence": "6", "gradient_accumulation_steps": 1}
    whole, shared = make(rows_per_step=24, **settings), make(rows_per_step=8, **settings)
    assert (whole.steps_per_pass, shared.steps_per_pass) == (1, 3)
    shared.lens = whole.lens
    seen = []
    whole.lens.subject_model.register_forward_pre_hook(lambda *_: seen.append(1))
    expected = whole.compute_loss(whole.lens, batch_of(whole)).item()
    seen.clear()
    losses = [shared.compute_loss(shared.lens, batch_of(shared, first)).item() for first in (0, 4, 8)]
    assert len(seen) == 1 and np.mean(losses) == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) == 3 and shared.tokens == 4 * SEQ_LEN


@pytest.mark.parametrize("blocks", [8, 9])
def test_an_epoch_has_a_step_for_each_part_of_each_pass(make, blocks):
    trainer = make(
        blocks=draw_blocks(blocks), positions_per_sequence="6", rows_per_step=8, gradient_accumulation_steps=1
    )
    read = []

    def note(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == SEQ_LEN:  # a readout is checked on fewer
            read.append(kwargs["input_ids"].numel())

    trainer.lens.subject_model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert sum(read) == trainer.tokens
    # the third pass is of one block, whose three parts fit into one step
    assert trainer.state.global_step == 2 * 3 + (blocks == 9) and trainer.tokens == blocks * SEQ_LEN


def test_layers_are_drawn_by_seed_epoch_and_pool_alone(make):
    first, again, other = (make(layers_per_step="2", seed=seed) for seed in (316, 316, 1))

    def draws(trainer, epoch=0):
        return [trainer.layers_of(epoch, pool) for pool in range(40)]

    assert draws(first) != draws(first, epoch=1)
    assert draws(first) == draws(again) != draws(other)
    assert all(len(set(layers)) == 2 and layers == sorted(layers) for layers in draws(first))
    counts = np.bincount(np.concatenate(draws(first)), minlength=LAYERS - 1)
    assert len(counts) == LAYERS - 1 and counts.min() >= 10


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_the_layers_of_the_step_move(make, name):
    trainer, states = make(layers_per_step="2", translator_optim=name, max_steps=6, learning_rate=1e-2), []
    trainer.add_callback(AtSteps(lambda step: states.append(copy.deepcopy(trainer.lens.state_dict()))))
    drawn = []
    draw = trainer.layers_of
    trainer.layers_of = lambda *of: drawn.append(draw(*of)) or drawn[-1]
    trainer.train()
    steps = [drawn[first] for first in (0, 2, 4, 5, 7, 9)]  # the third step of an epoch has one pass
    assert len({tuple(layers) for layers in steps}) > 2
    for layers, before, after in zip(steps, states[:-1], states[1:], strict=True):
        moved = {int(key.split(".")[1]) for key in before if not torch.equal(before[key], after[key])}
        assert moved == set(layers)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("rank", [4, None])
def test_one_step_moves_every_trained_tensor_and_nothing_else(make, name, rank):
    lens = new_lens(rank)
    before = copy.deepcopy(lens.state_dict())
    subject = copy.deepcopy(lens.subject_model.state_dict())
    make(lens, translator_optim=name, max_steps=1).train()
    trained = {key for key, _ in lens.named_parameters()}
    assert {key for key, tensor in lens.state_dict().items() if not torch.equal(tensor, before[key])} == trained
    assert len(trained) == (4 if rank else 3) * (LAYERS - 1)
    assert all(torch.equal(tensor, subject[key]) for key, tensor in lens.subject_model.state_dict().items())


# the penalties


def test_smallness_is_counted_once(make):
    lens = new_lens()
    plain, penalised = (make(lens, smallness=weight, smoothness=0.0) for weight in (0.0, 0.5))
    batch = batch_of(plain)
    without, having = gradients(plain, batch), gradients(penalised, batch)
    for name, parameter in lens.named_parameters():
        share = 0 if name.endswith("log_tau") else 2 * 0.5 / (LAYERS - 1)
        torch.testing.assert_close(having[name], without[name] + share * parameter.detach())
    assert TunedLensTrainingArguments(output_dir="x", use_cpu=True).weight_decay == 0


@pytest.mark.parametrize("rank", [4, None])
def test_smoothness_has_the_gradient_of_the_sum_over_pairs(make, rank):
    lens = new_lens(rank)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        lens.translators[1].c.add_(1)
    plain, penalised = (make(lens, smallness=0.0, smoothness=weight) for weight in (0.0, 0.5))
    batch = batch_of(plain)
    without, having = gradients(plain, batch), gradients(penalised, batch)
    lens.zero_grad()
    maps = [t.W if rank is None else t.U @ t.V.T for t in lens.translators]
    pairs = sum((b - a).square().sum() for a, b in zip(maps, maps[1:], strict=False))
    (0.5 * pairs / (LAYERS - 1)).backward()
    for name, parameter in lens.named_parameters():
        expected = 0 if parameter.grad is None else parameter.grad
        torch.testing.assert_close(having[name] - without[name], expected + 0 * parameter, rtol=1e-3, atol=1e-4)


# heads


def test_a_teacher_of_few_tokens_is_the_final_distribution_over_them(make):
    trainer = make(smallness=0.0, smoothness=0.0, positions_per_sequence="all", teacher_top_k=2)
    batch, lens = batch_of(trainer), trainer.lens
    residuals, final = lens.residuals(batch["input_ids"]), lens.subject_model(batch["input_ids"]).logits
    tokens = final.topk(2).indices.unique()
    assert 2 < len(tokens) < VOCAB_SIZE
    kl = [kl_divergence(final[..., tokens], lens.logits(k, residuals[k])[..., tokens]).mean().item() for k in range(4)]
    assert trainer.compute_loss(lens, batch).item() == pytest.approx(np.mean(kl), rel=1e-4)


def test_a_teacher_of_few_tokens_trains(make):
    lens = new_lens()
    every, all_of_them, few = (make(lens, teacher_top_k=k) for k in (None, VOCAB_SIZE, 4))
    batch = batch_of(every)
    assert few.compute_loss(lens, batch) != every.compute_loss(lens, batch)
    assert all_of_them.compute_loss(lens, batch).item() == pytest.approx(every.compute_loss(lens, batch).item())
    before = every.compute_loss(lens, batch).item()
    few = make(lens, teacher_top_k=4, max_steps=8, learning_rate=1e-2)
    few.train()
    assert every.compute_loss(lens, batch).item() < before


def test_a_head_in_bfloat16_trains(make):
    lens = new_lens()
    half, whole = make(lens, head_dtype="bfloat16", max_steps=2), make(lens, head_dtype="float32")
    assert half.head.weight.dtype == torch.bfloat16 and whole.head.weight.dtype == torch.float32
    batch = batch_of(half)
    assert half.compute_loss(lens, batch).item() == pytest.approx(whole.compute_loss(lens, batch).item(), rel=2e-2)
    half.train()
    assert all(parameter.dtype == torch.float32 for parameter in lens.parameters())


def test_a_subject_spread_over_devices_stays_where_it_is():
    lens = new_lens()
    lens.subject_model.hf_device_map = {"model": 0, "lm_head": 1}
    lens.to(torch.float64)
    assert lens.translators[0].c.dtype == torch.float64 and lens.subject_model.dtype == torch.float32
    del lens.subject_model.hf_device_map
    lens.to(torch.float64)
    assert lens.subject_model.dtype == torch.float64
