"""The KL at Â + (A' - Â'): with an A' of its own, and with one of another row of the batch."""

import pytest
import torch
from lens_runs import tiny_cache, tiny_lens

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.training.lm_reference import SubjectReference
from consistency_lens.training.objectives import Gumbel, Step


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    subject, tokenizer, cache = tiny_cache(tmp_path_factory.mktemp("cache"))
    rows = ActivationRows(cache, pair_seed=0)
    batch = ActivationCollator(0, 3, bos_token_id=1)([rows[i] for i in range(8)])
    return subject, tiny_lens(subject, tokenizer, cache), batch


@pytest.mark.parametrize("delta_residual", ["detached", "full"])
def test_the_delta_residual_of_a_perfect_lens_is_judged_as_perfect(setting, monkeypatch, delta_residual):
    subject, lens, batch = setting
    objective = Gumbel(subject, reference=None, delta_residual=delta_residual)

    def perfect(activations, **inputs):
        output = lens(activations=activations, **inputs)
        output.reconstruction = activations + 1.0  # a common error cancels: Â + (A' - Â') = A + A' - A' = A
        return output

    monkeypatch.setattr(lens, "read_ids", lambda ids: batch["other_activations"] + 1.0)
    assert objective(perfect, lens, batch, Step(0, 0)).terms["kl"] < 1e-5


def test_the_second_activation_takes_the_same_way_with_and_without_its_gradient(setting):
    subject, lens, batch = setting
    losses = [
        Gumbel(subject, None, delta_residual=name)(lens, lens, batch, Step(0, 1)).terms
        for name in ("detached", "full")
    ]
    torch.testing.assert_close(*(terms["kl"] for terms in losses), rtol=1e-5, atol=1e-6)


class KeysOfMates(Step):
    """Noise that a second pass shares with the first pass of each row's mate."""

    mates = torch.arange(8) ^ 1

    def keys(self, rows, draw=0):
        return super().keys(rows[self.mates] if draw else rows)


@pytest.mark.parametrize("delta_residual", ["detached", "full"])
def test_mates_give_the_losses_and_gradients_of_a_pass_of_its_own(setting, delta_residual):
    subject, lens, batch = setting
    step = KeysOfMates(seed=0, number=4)
    known = {name: tensor for name, tensor in batch.items() if name != "other_activations"}
    found = []
    for others in ({"mates": step.mates}, {"other_activations": batch["activations"][step.mates]}):
        objective = Gumbel(subject, SubjectReference(subject), delta_residual=delta_residual)
        terms = objective(lens, lens, known | others, step).terms
        torch.stack(list(terms.values())).sum().backward()
        found.append((terms, {name: p.grad for name, p in lens.named_parameters() if p.grad is not None}))
        lens.zero_grad()
    (terms, gradients), (expected, expected_gradients) = found
    assert terms["kl"] > 1e-2 and gradients.keys() == expected_gradients.keys()
    for name, term in expected.items():
        torch.testing.assert_close(terms[name], term, rtol=1e-5, atol=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_second_activation_that_is_missing_is_named(setting):
    subject, lens, batch = setting
    known = {name: tensor for name, tensor in batch.items() if name != "other_activations"}
    objective = Gumbel(subject, SubjectReference(subject), delta_residual="detached")
    with pytest.raises(ValueError, match="delta_residual: detached takes a second activation A', but the rows of a"):
        objective(lens, lens, known, Step(seed=0, number=4))
