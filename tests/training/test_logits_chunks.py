"""Objectives that hold a few rows of logits at a time: the same losses and gradients, and memory flat in V."""

import pytest
import torch
from lens_runs import tiny_cache, tiny_lens, tiny_trainer
from live_bytes import peak_bytes
from tiny_lenses import activations, disturb, trainable
from tiny_lenses import tiny_lens as wide_lens

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


def test_a_run_has_the_losses_of_one_without_chunks(tmp_path):
    settings = {"stages": ["warm_start 2s", "gumbel 2s", "policy_gradient"], "own_share": 0.5, "source": "on_the_fly"}
    losses = []
    for chunk_size in (0, CHUNK_SIZE):
        trainer = tiny_trainer(tmp_path / str(chunk_size), **settings, logits_chunk_size=chunk_size)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)


ROWS, LENGTH, CHUNK = 4, 3, 2
WIDE_OBJECTIVES = {
    "warm_start": lambda subject, kept, size: WarmStart(own_share=0.5, chunk_size=size),
    "gumbel": lambda subject, kept, size: Gumbel(subject, kept, delta_residual="full", chunk_size=size),
    "policy": lambda subject, kept, size: PolicyGradient(
        SubjectReference(subject), 2, "-kl", subject, straight_through=True, chunk_size=size
    ),
}


def step_peak(name, vocabulary, chunk_size):
    """The most bytes of tensors in a step from tokens to gradients, beside weights and gradients."""
    lens = wide_lens("llama", "frozen", {"vocab_size": vocabulary}, num_text_tokens=LENGTH).train()
    kept, subject = freeze_copy(lens.decoder), lens.subject
    subject.check_one_token(64)
    objective = WIDE_OBJECTIVES[name](subject, DecoderReference(kept), chunk_size)
    ids = torch.randint(3, vocabulary, (ROWS, 12), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": torch.full((ROWS,), 11),
        "tail_ids": ids[:, -LENGTH:], "tail_mask": torch.ones(ROWS, LENGTH, dtype=torch.bool),
        "given_text": torch.zeros(ROWS, dtype=torch.bool), "rows": torch.arange(ROWS),
        "other_activations": activations(ROWS, seed=1),
    }  # fmt: skip
    for parameter in trainable(lens).values():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        read = read_activations(subject, batch, keep_context=True, with_head=chunk_size == 0)
        torch.stack(list(objective(lens, lens, read, Step(0, 1)).terms.values())).sum().backward()

    return peak_bytes(step, torch.nn.ModuleList([lens, kept, subject.model]))


@pytest.mark.parametrize("name", WIDE_OBJECTIVES)
def test_memory_of_a_step_grows_with_the_vocabulary_by_one_chunk_of_rows(name):
    vocabularies = (8_192, 32_768, 131_072)
    peaks = [step_peak(name, vocabulary, CHUNK) for vocabulary in vocabularies]
    for vocabulary, peak in zip(vocabularies[1:], peaks[1:], strict=True):
        chunk = 4 * CHUNK * (vocabulary - vocabularies[0])
        # a chunk of logits, of the reference's, of gradients, and what the losses make of them meanwhile
        assert chunk < peak - peaks[0] < 8 * chunk
    at_once = [step_peak(name, vocabulary, 0) for vocabulary in vocabularies[:2]]
    assert at_once[1] - at_once[0] > 2 * 4 * ROWS * LENGTH * (vocabularies[1] - vocabularies[0])
