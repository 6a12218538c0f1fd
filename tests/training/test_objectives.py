import itertools

import pytest
import torch
from lens_runs import tiny_cache, tiny_lens

from consistency_lens.data.activation_cache import ActivationRows
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.losses import kl_divergence
from consistency_lens.training.objectives import (
    Gumbel,
    PolicyGradient,
    Step,
    SubjectReference,
    WarmStart,
    freeze_copy,
    functional_kl,
    group_advantage,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    subject, tokenizer, cache = tiny_cache(tmp_path_factory.mktemp("cache"))
    rows = ActivationRows(cache, pair_seed=0)
    batch = ActivationCollator(0, 3, bos_token_id=1)([rows[i] for i in range(8)])
    return subject, tiny_lens(subject, tokenizer, cache), batch


def test_warm_start_reads_own_texts_in_the_rows_that_their_keys_name(setting):
    _, lens, batch = setting
    objective, step, read = WarmStart(own_share=0.5), Step(seed=0, number=3), []

    def spy(**inputs):
        read.append(inputs["encoder_text_ids"])
        return lens(**inputs)

    objective(spy, lens, batch, step)
    own = (step.keys(batch["rows"]) & 0xFFFF) < 0.5 * 2**16
    assert 0 < own.sum() < len(own)
    assert torch.equal(read[0][~own], batch["tail_ids"][~own])
    assert not torch.equal(read[0][own], batch["tail_ids"][own])
    half = {name: tensor[4:] for name, tensor in batch.items()}
    objective(spy, lens, half, step)
    assert torch.equal(read[1], read[0][4:])  # a row reads the same text in any batch


def test_the_kl_term_is_zero_for_the_activation_itself(setting):
    subject, _, batch = setting
    assert functional_kl(subject, batch, batch["activations"]).abs().max() < 1e-5
    assert functional_kl(subject, batch, batch["other_activations"]).min() > 1e-3


def test_the_delta_residual_of_a_perfect_lens_is_judged_as_perfect(setting):
    subject, lens, batch = setting
    objective = Gumbel(subject, reference=None, delta_residual="detached")

    def perfect(activations, **inputs):
        output = lens(activations=activations, **inputs)
        output.reconstruction = activations + 1.0  # a common error cancels: Â + (A' - Â') = A + A' - A' = A
        return output

    assert objective(perfect, lens, batch, Step(0, 0)).terms["kl"] < 1e-5


def test_the_subject_as_reference_reads_the_text_after_bos(setting):
    subject, _, batch = setting
    ids = batch["tail_ids"]
    logits = SubjectReference(subject)(batch["activations"], ids)
    whole = subject.model(input_ids=torch.cat([torch.ones_like(ids[:, :1]), ids], dim=1)).logits
    torch.testing.assert_close(logits, whole[:, :-1], atol=1e-5, rtol=1e-4)


def test_a_frozen_copy_stays_while_the_decoder_trains(setting):
    _, lens, batch = setting
    reference = freeze_copy(lens.decoder)
    logits = reference(batch["activations"], batch["tail_ids"])
    with torch.no_grad():
        lens.decoder.projection.bias.add_(1.0)
    after = kl_divergence(lens.decoder(batch["activations"], batch["tail_ids"]), logits)
    assert torch.equal(reference(batch["activations"], batch["tail_ids"]), logits) and after.max() > 1e-4
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    with torch.no_grad():
        lens.decoder.projection.bias.sub_(1.0)


def test_group_advantage_is_centred_and_scaled_in_each_group():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0])
    advantage = group_advantage(rewards, 3).view(2, 3)
    assert torch.allclose(advantage.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(advantage.std(1), torch.ones(2), atol=1e-3)
    assert advantage[1].argmax() == 1


def test_equal_rewards_give_no_advantage():
    assert torch.equal(group_advantage(torch.full((4,), -0.3), 4), torch.zeros(4))


def test_the_policy_term_is_the_score_function_of_the_samples(setting):
    """Its gradient is -mean(advantage x grad log p(text)), with rewards -mse that carry no gradient."""
    _, lens, batch = setting
    step, group_size = Step(0, 1), 4
    terms = PolicyGradient(reference=None, group_size=group_size)(lens, lens, batch, step).terms
    (got,) = torch.autograd.grad(terms["policy"], lens.decoder.projection.bias)

    activations = batch["activations"].repeat_interleave(group_size, dim=0)
    keys = torch.stack([step.keys(batch["rows"], draw) for draw in range(group_size)], dim=1).flatten()
    ids = lens.decode_ids(activations, keys=keys)
    log_p = lens.decoder(activations, ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0].mean(1)
    error = ((activations - lens.encode(ids)) / lens.rms).square().mean(1)
    expected_loss = -(group_advantage(-error, group_size) * log_p).mean()
    (expected,) = torch.autograd.grad(expected_loss, lens.decoder.projection.bias)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    assert got.abs().max() > 0


def test_samples_of_one_activation_differ_and_belong_to_their_row(setting):
    _, lens, batch = setting
    step = Step(0, 1)
    texts = [lens.decode_ids(batch["activations"], keys=step.keys(batch["rows"], draw)) for draw in range(3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(texts, 2))
    alone = lens.decode_ids(batch["activations"][2:3], keys=step.keys(batch["rows"][2:3], 1))
    assert torch.equal(alone[0], texts[1][2])
