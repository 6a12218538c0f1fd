"""The opponent of the speed benchmarks does the same work: its losses and gradients are those of the lens."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_lenses import PROMPTS, activations, disturb, tiny_lens
from tiny_models import random_tokens

from consistency_lens.plain_arithmetic import plain_arithmetic
from consistency_lens.residual_stream import gather_positions
from consistency_lens.straight_through import fold_in, gumbel_noise
from consistency_lens.subject import Subject
from consistency_lens.training.lm_reference import SubjectReference
from consistency_lens.training.objectives import Gumbel, Step

BENCHMARKS = Path(__file__).parent / "benchmarks"
WEIGHTS, TAU = {"kl": 1.0, "lm": 0.3}, 0.7


@pytest.fixture(scope="module")
def spec_reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import spec_reference

        yield spec_reference


def batch_of(subject):
    input_ids, attention_mask = random_tokens(9, 12, 5, 12)
    positions = attention_mask.sum(1) - 1
    return {
        "activations": gather_positions(subject.activations(input_ids, attention_mask), positions[:, None])[:, 0],
        "other_activations": activations(4, seed=1),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": positions,
        "rows": torch.arange(4),
    }


def loss_of(terms):
    return sum(weight * terms[name] for name, weight in WEIGHTS.items())


def noise_of(keys):
    return lambda step, logits: gumbel_noise(fold_in(keys, step), logits.shape[-1])


def turn_off(lens):
    """Every fast way that is off by a switch of its own; a subject that runs whole sequences is returned."""
    lens.decoder.sums_gradients = lens.decoder.attends_in_place = lens.decoder.keeps_noise = False
    lens.encoder.stops_early = False
    subject = Subject(lens.subject.model, lens.subject.layer, one_token=False, context_attention=False)
    subject.stream.may_stop = False
    return subject


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_the_plans_step_and_ours_have_the_same_losses_and_gradients(spec_reference, fast, cached, paired):
    lens = disturb(tiny_lens(training="full", **PROMPTS), scale=0.01)
    # clones that differ from the subject and from each other
    plan = spec_reference.SpecStep(lens, cached=cached)
    plan.decoder.load_state_dict(lens.decoder.base.state_dict())
    plan.encoder.get_decoder().load_state_dict(lens.encoder.base.state_dict(), strict=False)

    step = Step(seed=0, number=5, tau=TAU)
    subject, batch = lens.subject if fast else turn_off(lens), batch_of(lens.subject)
    objective = Gumbel(subject, SubjectReference(subject), lm_direction="forward", delta_residual="detached")
    keys = [step.keys(batch["rows"], draw) for draw in (0, 1)]
    if paired:  # A' and Â' are those of another row of the batch
        mates = torch.tensor([2, 3, 0, 1])
        batch |= {"mates": mates, "other_activations": batch["activations"][mates]}
        keys[1] = keys[0][mates]
    with nullcontext() if fast else plain_arithmetic():
        ours = objective(lens, lens, batch, step).terms
        loss_of(ours).backward()
    theirs = plan(batch, TAU, *(noise_of(k) for k in keys))
    loss_of(theirs).backward()

    for name in WEIGHTS:
        assert theirs[name] > 1e-2
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    pairs = [
        (lens.decoder.projection, plan.projection),
        (lens.encoder.output_map, plan.output_map),
        (lens.decoder.base, plan.decoder),
        (lens.encoder.base, plan.encoder.get_decoder()),
    ]
    compared = 0
    for mine, other in pairs:
        others = dict(other.named_parameters())
        for name, parameter in mine.named_parameters():
            if parameter.grad is not None and parameter.grad.norm() > 0:
                torch.testing.assert_close(
                    parameter.grad, others[name].grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
                compared += 1
    for mine, other in ((lens.decoder, plan.decoder_prompt), (lens.encoder, plan.encoder_prompt)):
        torch.testing.assert_close(mine.prefix_embeddings.grad, other[0].grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.suffix_embeddings.grad, other[1].grad, rtol=1e-3, atol=1e-5)
    assert compared > 30
