"""Texts that end at a stop token: what lies behind it is not drawn, read or counted."""

from types import SimpleNamespace

import pytest
import torch
from lens_runs import tiny_lens
from test_objectives import setting, spied

from consistency_lens.losses import entropy, kl_divergence
from consistency_lens.training.lm_reference import SubjectReference
from consistency_lens.training.objectives import Gumbel, PolicyGradient, Step, WarmStart

__all__ = ["setting"]


def stopping(lens, token):
    """The same lens with a stop token."""
    statistics = SimpleNamespace(mean=lens.mean, rms=lens.rms)
    return tiny_lens(lens.subject, lens.tokenizer, statistics, stop_token_id=token)


def drawn_texts(lens, batch, step, draws):
    """Activations and ids of so many draws of each row, and the lens with a stop token that the first begins with."""
    activations = batch["activations"].repeat_interleave(draws, dim=0)
    keys = torch.stack([step.keys(batch["rows"], draw) for draw in range(draws)], dim=1).flatten()
    ids = lens.decode_ids(activations, keys=keys)
    return activations, ids, stopping(lens, int(ids[0, 0]))


def test_nothing_behind_a_stop_token_is_drawn_or_read(setting):
    _, lens, _ = setting
    stops = stopping(lens, 2)
    ids = torch.tensor([[2, 7, 8], [5, 2, 8], [5, 6, 2], [5, 6, 7]])
    assert stops.drawn_mask(ids).tolist() == [[True, False, False], [True, True, False], [True] * 3, [True] * 3]
    # the first token is read even if it is the stop: an encoder cannot read nothing
    assert stops.text_mask(ids).tolist() == [[True, False, False]] * 2 + [[True, True, False], [True] * 3]
    assert lens.text_mask(ids).all() and lens.drawn_mask(ids).all()


@pytest.mark.parametrize("draws", [1, 2], ids=["gumbel", "policy_gradient"])
def test_nothing_behind_a_stop_token_counts_in_a_term(setting, draws):
    subject, lens, batch = setting
    step, reference = Step(0, 2), SubjectReference(subject)
    activations, ids, stops = drawn_texts(lens, batch, step, draws)
    drawn = stops.drawn_mask(ids)
    assert drawn[0].tolist() == [True, False, False] and drawn[1:].any()
    own, told = stops.decoder(activations, ids), reference(activations, ids).states.unflatten(0, ids.shape)
    if draws == 1:
        objective, divergence = Gumbel(subject, reference, needs_kl=False), kl_divergence(told, own)
    else:
        objective, divergence = PolicyGradient(reference, group_size=draws), kl_divergence(own, told)
    losses = objective(stops, stops, batch, step)
    for name, values in {"lm": divergence, "entropy": entropy(own)}.items():
        expected = torch.stack([row[mask].mean() for row, mask in zip(values, drawn, strict=True)]).mean()
        torch.testing.assert_close((losses.metrics | losses.terms)[name], expected, atol=1e-5, rtol=1e-4)


def test_warm_start_reads_an_own_text_as_far_as_its_stop_token(setting):
    _, lens, batch = setting
    step, seen = Step(0, 2), []
    _, ids, stops = drawn_texts(lens, batch, step, 1)
    WarmStart(own_share=1.0, shorter_share=1.0)(spied(stops, seen), stops, batch, step)
    assert torch.equal(seen[0]["encoder_text_mask"], stops.text_mask(ids)) and not stops.text_mask(ids).all()
