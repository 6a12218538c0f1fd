"""Objectives that hold a few rows of logits at a time: the same losses and gradients, and memory flat in V."""

import pytest
import torch
from lens_runs import tiny_cache, tiny_lens
from tiny_lenses import disturb, trainable

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.on_the_fly import read_activations
from consistency_lens.data.shared_contexts import share_contexts
from consistency_lens.training.lm_reference import DecoderReference, SubjectReference, freeze_copy
from consistency_lens.training.objectives import Gumbel, PolicyGradient, Step, WarmStart

# of 8 rows of 3 tokens, so that neither rows nor tokens come out even
CHUNK_SIZE = 5


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    subject, tokenizer, cache = tiny_cache(tmp_path_factory.mktemp("cache"))
    rows = ActivationRows(cache, pair_seed=0)
    batch = share_contexts(ActivationCollator(0, 3, bos_token_id=1)([rows[i] for i in range(8)]))
    assert len(batch["input_ids"]) < 8
    lens = tiny_lens(subject, tokenizer, cache)
    kept = DecoderReference(freeze_copy(lens.decoder))
    return subject, disturb(lens), batch, {"none": None, "subject": SubjectReference(subject), "kept": kept}


OBJECTIVES = {
    "warm_start": lambda subject, references: WarmStart(own_share=0.5, shorter_share=0.5),
    "gumbel": lambda subject, references: Gumbel(subject, references["none"]),
    "gumbel_forward": lambda subject, references: Gumbel(
        subject, references["subject"], "forward", delta_residual="detached", needs_entropy=False
    ),
    "gumbel_reverse": lambda subject, references: Gumbel(
        subject, references["kept"], "reverse", delta_residual="full"
    ),
    "policy": lambda subject, references: PolicyGradient(references["kept"], 2, prefix_budgets=True),
    "policy_kl": lambda subject, references: PolicyGradient(
        references["subject"], 2, "-kl", subject, lm_direction="forward"
    ),
    "policy_straight_through": lambda subject, references: PolicyGradient(
        references["subject"], 2, straight_through=True
    ),
    "policy_k3": lambda subject, references: PolicyGradient(references["kept"], 2, lm_estimator="k3"),
}  # fmt: skip


def losses_of(objective, lens, batch):
    """Terms and metrics of a step, and the gradients of the sum of its terms."""
    lens.zero_grad()
    losses = objective(lens, lens, batch, Step(0, 3, tau=0.7))
    torch.stack(list(losses.terms.values())).sum().backward()
    return losses.terms, losses.metrics, {name: tensor.grad for name, tensor in trainable(lens).items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_all_logits_at_once(setting, name):
    subject, lens, batch, references = setting
    objective = OBJECTIVES[name](subject, references)
    expected = losses_of(objective, lens, batch)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in expected[2].values())
    objective.chunk_size = CHUNK_SIZE
    torch.testing.assert_close(losses_of(objective, lens, batch), expected, rtol=1e-4, atol=1e-6)


def test_a_context_that_was_read_on_the_fly_keeps_no_logits(setting):
    subject, lens, batch, references = setting
    whole, apart = (read_activations(subject, batch, True, with_head) for with_head in (True, False))
    assert whole["context"].logits.shape[-1] == 97 and apart["context"].logits.shape[-1] == 32
    objective = Gumbel(subject, references["subject"], delta_residual="full")
    expected = losses_of(objective, lens, whole)
    objective.chunk_size = CHUNK_SIZE
    torch.testing.assert_close(losses_of(objective, lens, apart), expected, rtol=1e-4, atol=1e-6)
