"""What a training step costs, counted in FLOPs and bytes of tensors, never in seconds."""

import traceback

import pytest
import torch
from flop_count import flops
from live_bytes import peak_bytes
from tiny_lenses import activations, tiny_lens
from tiny_models import random_tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from consistency_lens.data.on_the_fly import read_activations
from consistency_lens.data.shared_contexts import share_contexts
from consistency_lens.losses import entropy, kl_divergence, token_cross_entropy
from consistency_lens.straight_through import (
    CHUNK_ELEMENTS_ON_CPU,
    row_keys,
    sample_tokens,
    straight_through_embedding,
)
from consistency_lens.training.lm_reference import SubjectReference
from consistency_lens.training.objectives import Gumbel, Step

BATCH = 4


@pytest.fixture(scope="module")
def lens():
    lens = tiny_lens(training="full")
    lens.subject.check_one_token(128)
    return lens


def batch_of(length, num_positions=1):
    """Rows of sequences of `length` tokens, each read at its last ones."""
    sequences = BATCH // num_positions
    input_ids = random_tokens(*[length] * sequences)[0].repeat_interleave(num_positions, 0)
    positions = torch.arange(length - num_positions, length).repeat(sequences)
    mask = (torch.arange(length) <= positions[:, None]).long()
    other = activations(BATCH, seed=1)
    rows = {"positions": positions, "rows": torch.arange(BATCH), "other_activations": other}
    return share_contexts({"input_ids": input_ids * mask, "attention_mask": mask, **rows})


def step_flops(lens, batch, read=True):
    """Of a Gumbel step with everything in it, forward and backward; without `read`, but for the context pass."""
    subject = lens.subject
    objective = Gumbel(subject, SubjectReference(subject), delta_residual="detached")
    known = {} if read else read_activations(subject, batch, keep_context=True)

    def step():
        terms = objective(lens, lens, known or read_activations(subject, batch, keep_context=True), Step(0, 0)).terms
        torch.stack(list(terms.values())).sum().backward()

    count = flops(step)
    lens.zero_grad()
    return count


def test_a_step_is_linear_in_the_tokens_of_a_text():
    costs = {}
    for length in (2, 2, 4, 8, 16):  # the first step of a process also tries whether the model attends in place
        lens = tiny_lens(training="full", num_text_tokens=length)
        costs[length] = step_flops(lens, batch_of(12), read=False)
    slopes = [(costs[2 * n] - costs[n]) / n for n in (2, 4, 8)]
    assert min(slopes) > 0
    # attention over the text is the part that is not, and it is small
    assert max(slopes) < 1.05 * min(slopes)


def test_a_step_is_flat_in_the_context_but_for_one_pass_over_it(lens):
    short, long = (step_flops(lens, batch_of(length), read=False) for length in (16, 64))
    assert long < 1.02 * short
    passes = {}
    for length in (16, 64):
        batch = batch_of(length)
        passes[length] = flops(lambda batch=batch: read_activations(lens.subject, batch, keep_context=True))
        assert step_flops(lens, batch) == pytest.approx(passes[length] + step_flops(lens, batch, read=False), rel=1e-6)
    # the head runs at P alone, so four times the tokens are at most four times the work
    assert 3 < passes[64] / passes[16] <= 4.1


def test_activations_of_one_sequence_share_its_pass(lens):
    alone, together = batch_of(64), batch_of(64, num_positions=BATCH)
    assert together["input_ids"].shape[0] == 1
    costs = [
        flops(lambda batch=batch: read_activations(lens.subject, batch, keep_context=True))
        for batch in (alone, together)
    ]
    assert costs[1] < 0.3 * costs[0]


def test_the_second_activation_costs_no_backward_pass(lens):
    subject, batch = lens.subject, batch_of(12)
    read = read_activations(subject, batch, keep_context=True)
    costs = {}
    for name in ("none", "detached", "full"):
        for kind, known in (("", read), (" with mates", read | {"mates": torch.arange(BATCH) ^ 1})):
            objective = Gumbel(subject, None, delta_residual=name)
            costs[name + kind] = flops(
                lambda o=objective, b=known: o(lens, lens, b, Step(0, 0)).terms["kl"].backward()
            )
            lens.zero_grad()
    extra = {name: costs[name] - costs["none"] for name in costs}
    assert 0 < extra["detached"] < 0.4 * extra["full"]
    assert extra["detached with mates"] == extra["full with mates"] == 0


class Waits(TorchDispatchMode):
    """Notes from where operations are called that wait for the device: those whose result the CPU has to know."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.callers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in self.NAMES:
            files = [frame.filename for frame in traceback.extract_stack()]
            packages = ("consistency_lens", "transformers")
            self.callers.append(next(name for file in reversed(files) for name in packages if f"/{name}/" in file))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_positions", [1, BATCH])
@pytest.mark.parametrize("delta_residual", ["none", "detached", "full"])
def test_a_step_waits_for_the_device_in_the_masks_of_transformers_alone(lens, num_positions, delta_residual):
    subject, batch = lens.subject, batch_of(12, num_positions)
    objective = Gumbel(subject, SubjectReference(subject), delta_residual=delta_residual)
    with Waits() as waits:
        terms = objective(lens, lens, read_activations(subject, batch, keep_context=True), Step(0, 0)).terms
        torch.stack(list(terms.values())).sum().backward()
    lens.zero_grad()
    assert set(waits.callers) == {"transformers"} and len(waits.callers) <= 4


def vocabulary_losses(logits, other, table):
    keys, ids = row_keys(0, 0, torch.arange(len(logits))), torch.zeros(len(logits), dtype=torch.long)
    return {
        "kl": lambda: kl_divergence(other, logits).sum().backward(),
        "reverse kl": lambda: kl_divergence(logits, other).sum().backward(),
        "entropy": lambda: entropy(logits).sum().backward(),
        "cross entropy": lambda: token_cross_entropy(logits[None], ids[None]).sum().backward(),
        "samples": lambda: sample_tokens(logits, keys),
        "straight through": lambda: straight_through_embedding(
            logits, sample_tokens(logits, keys), keys, table, 1.0
        ).sum().backward(),
    }  # fmt: skip


@pytest.mark.parametrize("name", vocabulary_losses(torch.zeros(1, 1), None, None))
def test_beside_logits_and_their_gradient_memory_is_flat_in_the_vocabulary(name):
    beside = {}
    for vocabulary in (8_192, 32_768, 131_072):
        rows = 3 * CHUNK_ELEMENTS_ON_CPU // vocabulary  # the same number of logits each time, three chunks
        generator = torch.Generator().manual_seed(0)
        logits = nn.Parameter(torch.randn(rows, vocabulary, generator=generator))
        other = nn.Parameter(torch.randn(rows, vocabulary, generator=generator), requires_grad=False)
        work = vocabulary_losses(logits, other, torch.zeros(vocabulary, 2))[name]
        gradient = 0 if name == "samples" else logits.nbytes
        beside[vocabulary] = peak_bytes(work, nn.ParameterList([logits, other])) - gradient
    # a few copies of one chunk, whatever V is; the vocabulary's own hash words are V integers, made of V others
    assert all(held < 6 * 4 * CHUNK_ELEMENTS_ON_CPU + 16 * vocabulary for vocabulary, held in beside.items())
    assert max(beside.values()) - min(beside.values()) < 32 * 131_072
