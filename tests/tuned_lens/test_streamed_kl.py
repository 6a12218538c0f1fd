import math

import pytest
import torch

from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens.streamed_kl import Head, mean_probabilities, read_teacher, streamed_kl, top_tokens

LAYERS, ROWS, WIDTH, VOCAB = 3, 7, 16, 101
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "soft-cap": {"soft_cap": 3.0},
    "bias and soft-cap": {"bias": True, "soft_cap": 3.0},
}
# one logit at a time, several chunks of which the last is shorter, all at once
CHUNKS = [1, LAYERS * ROWS * 13, 1 << 20]


def make_head(bias: bool = False, soft_cap: float | None = None) -> Head:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    return Head(weight, torch.randn(VOCAB, generator=generator) if bias else None, soft_cap)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def plain_logits(x: torch.Tensor, head: Head) -> torch.Tensor:
    logits = x @ head.weight.T + (0 if head.bias is None else head.bias)
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_numbers", CHUNKS)
def test_loss_and_gradients_equal_autograd(settings, chunk_numbers):
    head, final = make_head(**settings), rows(1, ROWS)
    weights = torch.rand(LAYERS, ROWS, generator=torch.Generator().manual_seed(2))
    results = []
    for streamed in (True, False):
        x = rows(3, LAYERS, ROWS).requires_grad_()
        tau = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
        if streamed:
            kl = streamed_kl(x, tau, read_teacher(final, head, chunk_numbers), head, chunk_numbers)
        else:
            final_logits = plain_logits(final, head).expand(LAYERS, -1, -1)
            kl = kl_divergence(final_logits, plain_logits(x, head) / tau[:, None, None])
        (kl * weights).sum().backward()
        results.append((kl, x.grad, tau.grad))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_the_teacher_itself_has_no_kl_and_no_gradient(settings):
    head, final = make_head(**settings), rows(1, ROWS)
    x = final[None].clone().requires_grad_()
    kl = streamed_kl(x, torch.ones(1), read_teacher(final, head), head)
    kl.sum().backward()
    assert kl.abs().max() < 1e-5 and x.grad.abs().max() < 1e-5


def test_by_hand_in_nats():
    # logits 0 and log 3 against logits 0 and 0: p = (1/4, 3/4), q = (1/2, 1/2)
    head = Head(torch.eye(2), None)
    teacher = read_teacher(torch.tensor([[0.0, math.log(3)]]), head)
    kl = streamed_kl(torch.zeros(1, 1, 2), torch.ones(1), teacher, head).item()
    assert kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert kl / math.log(2) == pytest.approx(1 - 0.811278, abs=1e-5)  # one bit less the entropy of p
    assert teacher.negative_entropy.item() == pytest.approx(-0.811278 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("chunk_numbers", CHUNKS)
def test_very_large_logits_stay_finite(chunk_numbers):
    head = Head(1e3 * make_head().weight, None)
    x = rows(3, LAYERS, ROWS).requires_grad_()
    teacher = read_teacher(rows(1, ROWS), head, chunk_numbers)
    kl = streamed_kl(x, torch.ones(LAYERS), teacher, head, chunk_numbers)
    kl.sum().backward()
    assert kl.isfinite().all() and x.grad.isfinite().all()


def test_without_gradient_the_loss_is_the_same():
    head, x = make_head(bias=True), rows(3, LAYERS, ROWS)
    teacher = read_teacher(rows(1, ROWS), head)
    with_gradient = streamed_kl(x.clone().requires_grad_(), torch.ones(LAYERS), teacher, head)
    assert torch.equal(streamed_kl(x, torch.ones(LAYERS), teacher, head), with_gradient)


def test_a_head_in_bfloat16_is_close():
    head, x, tau = make_head(), rows(3, LAYERS, ROWS), torch.ones(LAYERS)
    half = Head(head.weight.bfloat16(), None)
    exact = streamed_kl(x, tau, read_teacher(rows(1, ROWS), head), head)
    close = streamed_kl(x, tau, read_teacher(rows(1, ROWS), half), half)
    assert close.dtype == torch.float32
    assert (close - exact).abs().max() < 0.02 * exact.mean()


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_numbers", CHUNKS)
def test_mean_probabilities_are_those_of_the_rows(settings, chunk_numbers):
    head, final = make_head(**settings), rows(1, ROWS)
    found = mean_probabilities(read_teacher(final, head), head, chunk_numbers)
    torch.testing.assert_close(found, plain_logits(final, head).softmax(dim=-1).mean(dim=0), rtol=1e-4, atol=1e-7)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_the_teacher_is_read_by_hand(settings):
    head, final = make_head(**settings), rows(1, ROWS)
    logits = plain_logits(final, head)
    p = logits.softmax(dim=-1)
    teacher = read_teacher(final, head, chunk_numbers=ROWS * 13)
    torch.testing.assert_close(teacher.lse, logits.logsumexp(dim=-1))
    torch.testing.assert_close(teacher.expected_logit, (p * logits).sum(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.expected_weight, p @ head.weight, rtol=1e-4, atol=1e-5)


def test_top_tokens_are_the_union_of_the_rows():
    head, final = make_head(), rows(1, ROWS)
    teacher = read_teacher(final, head)
    expected = sorted(set(plain_logits(final, head).topk(5).indices.flatten().tolist()))
    assert top_tokens(teacher, head, 5).tolist() == expected


def test_on_top_tokens_both_sides_are_renormalised():
    head, x, final = make_head(bias=True), rows(3, LAYERS, ROWS), rows(1, ROWS)
    ids = torch.tensor([3, 50, 99])
    few = head.rows(ids)
    found = streamed_kl(x, torch.ones(LAYERS), read_teacher(final, few), few)
    p = plain_logits(final, head)[:, ids].expand(LAYERS, -1, -1)
    torch.testing.assert_close(found, kl_divergence(p, plain_logits(x, head)[..., ids]), rtol=1e-4, atol=1e-5)
