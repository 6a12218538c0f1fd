import math

import pytest
import torch
import torch.nn.functional as F

from consistency_lens.losses import (
    entropy,
    functional_target,
    group_advantage,
    k3_divergence,
    kl_divergence,
    normalised_mse,
    token_cross_entropy,
)


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_kl(p_logits, q_logits):
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def plain_entropy(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def gradients(loss, *inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*inputs)
    # unequal weights, so that a gradient that forgets its row's weight is seen
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).view(value.shape)
    return value, *torch.autograd.grad((weights * value).sum(), inputs)


def assert_same(got, expected, **tolerance):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_kl_and_both_gradients_equal_the_plain_formula(chunk_size):
    p, q = random_logits(3, 5, 40), random_logits(3, 5, 40, seed=1)
    assert_same(gradients(lambda a, b: kl_divergence(a, b, chunk_size), p, q), gradients(plain_kl, p, q))


def test_kl_against_a_constant_reference_trains_the_other_side_alone():
    p, q = random_logits(6, 40), random_logits(6, 40, seed=1).requires_grad_()
    kl_divergence(p, q).sum().backward()
    torch.testing.assert_close(q.grad, q.detach().softmax(-1) - p.softmax(-1))
    assert p.grad is None


def test_kl_is_in_nats():
    p, q = torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2))


def test_kl_of_equal_logits_is_exactly_zero():
    logits = random_logits(4, 300, dtype=torch.float32)
    value, grad_p, grad_q = gradients(kl_divergence, logits, logits)
    assert (value == 0).all() and (grad_p == 0).all() and (grad_q == 0).all()


def test_kl_with_tokens_at_minus_infinity_in_both_ignores_them():
    p, q = random_logits(4, 20), random_logits(4, 20, seed=1)
    expected = gradients(plain_kl, p[:, 3:], q[:, 3:])
    p[:, :3] = q[:, :3] = -torch.inf
    value, grad_p, grad_q = gradients(kl_divergence, p, q)
    assert_same((value, grad_p[:, 3:], grad_q[:, 3:]), expected)
    assert (grad_p[:, :3] == 0).all() and (grad_q[:, :3] == 0).all()


def test_kl_is_infinite_where_q_excludes_what_p_allows():
    p, q = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    value = kl_divergence(p, q)
    assert value.item() == math.inf
    value.backward()
    assert q.grad.isfinite().all()


def test_a_token_too_unlikely_for_its_number_adds_nothing_where_q_excludes_it():
    p, q = torch.tensor([0.0, -200.0, 0.0]), torch.tensor([1.0, -torch.inf, 1.0])
    assert kl_divergence(p, q).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("place", [0, 2])
def test_a_logit_that_is_not_a_number_shows(side, place):
    pair = [torch.zeros(2, 3), torch.zeros(2, 3)]
    pair[side][1, place] = torch.nan
    assert kl_divergence(*pair).isnan().tolist() == [False, True]
    assert entropy(pair[side]).isnan().tolist() == [False, True]


@pytest.mark.parametrize("loss", [kl_divergence, lambda p, q: entropy(p) + entropy(q)])
def test_bfloat16_logits_are_computed_in_float32(loss):
    p, q = (random_logits(6, 500, seed=seed).bfloat16() for seed in range(2))
    value, *grads = gradients(loss, p, q)
    expected, *expected_grads = gradients(loss, p.double(), q.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5)
    assert_same(grads, [grad.bfloat16() for grad in expected_grads], rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("loss", ["kl", "entropy", "cross_entropy"])
def test_no_float32_copy_of_the_logits_is_kept(loss):
    logits = random_logits(8, 4, 100).bfloat16().requires_grad_()
    losses = {
        "kl": lambda: kl_divergence(logits.detach(), logits),
        "entropy": lambda: entropy(logits),
        "cross_entropy": lambda: token_cross_entropy(logits, torch.zeros(8, 4, dtype=torch.long)),
    }
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses[loss]()
    assert [tensor.dtype for tensor in kept if tensor.numel() >= logits.numel()] == [torch.bfloat16]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_entropy_and_gradient_equal_the_plain_formula(chunk_size):
    logits = random_logits(3, 5, 40)
    assert_same(gradients(lambda x: entropy(x, chunk_size), logits), gradients(plain_entropy, logits))


def test_entropy_of_a_uniform_choice_is_the_logarithm_of_its_size():
    logits = torch.tensor([[0.0] * 8, [0.0] * 4 + [-torch.inf] * 4])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(8), math.log(4)]))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_cross_entropy_equals_that_of_torch(chunk_size):
    logits, ids = random_logits(4, 6, 40), torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(0))

    def plain(x):
        return F.cross_entropy(x.transpose(1, 2), ids, reduction="none").mean(dim=1)

    def chunked(x):
        return token_cross_entropy(x, ids, chunk_size=chunk_size)

    assert_same(gradients(chunked, logits), gradients(plain, logits))


def test_masked_tokens_count_for_nothing():
    logits, ids = random_logits(2, 5, 40), torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = token_cross_entropy(logits[:1, 2:], ids[:1, 2:])
    ids[0, :2] = -100
    logits[0, :2] = torch.nan
    logits.requires_grad_()
    losses = token_cross_entropy(logits, ids, mask)
    torch.testing.assert_close(losses[:1], expected)
    losses.sum().backward()
    assert (logits.grad[0, 2:] != 0).any()
    assert (logits.grad[1] != 0).any()


def test_a_text_without_tokens_costs_nothing():
    nothing = torch.zeros(1, 3, dtype=torch.long)
    assert token_cross_entropy(random_logits(1, 3, 5), nothing, mask=nothing).item() == 0


def test_normalised_mse_is_one_for_an_error_of_one_rms():
    target = random_logits(4, 16, dtype=torch.float32)
    torch.testing.assert_close(normalised_mse(target, target + 2.5, rms=2.5), torch.ones(4))


def test_normalised_mse_of_bfloat16_is_computed_in_float32():
    target = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    assert normalised_mse(target, torch.full((1, 4), 255.5, dtype=torch.float32), rms=0.5).item() == pytest.approx(1.0)


@pytest.mark.parametrize("detach", [True, False])
def test_functional_target_adds_the_residual_of_the_other_activation(detach):
    reconstruction, other, other_reconstruction = (random_logits(2, 3, seed=seed) for seed in range(3))
    reconstruction.requires_grad_(), other_reconstruction.requires_grad_()
    target = functional_target(reconstruction, other, other_reconstruction, detach)
    torch.testing.assert_close(target, reconstruction + other - other_reconstruction)
    target.sum().backward()
    assert (reconstruction.grad == 1).all()
    assert (other_reconstruction.grad is None) == detach


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4)), r"one shape, got \(2, 3\) and \(2, 4\)"),
        (
            lambda: token_cross_entropy(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.long)),
            r"ids and mask of shape \(1, 2\), got \(1, 1\)",
        ),
        (lambda: entropy(torch.zeros(2, 3), chunk_size=0), "chunk_size must be at least 1 row, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_k3_is_the_kl_in_the_mean_and_its_gradient_that_of_the_other_direction():
    torch.manual_seed(0)
    p_logits, q_logits = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    chances = log_p.exp().detach()
    estimates = k3_divergence(log_p, log_q)  # one for each token that might be drawn
    torch.testing.assert_close((chances * estimates).sum(), kl_divergence(p_logits, q_logits))
    assert (estimates >= 0).all()
    (got,) = torch.autograd.grad((chances * estimates).sum(), p_logits, retain_graph=True)
    (expected,) = torch.autograd.grad(kl_divergence(q_logits, p_logits), p_logits)
    torch.testing.assert_close(got, expected)


def test_group_advantage_is_centred_and_scaled_in_each_group():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0])
    advantage = group_advantage(rewards, 3).view(2, 3)
    assert torch.allclose(advantage.mean(1), torch.zeros(2), atol=1e-6)
    assert torch.allclose(advantage.std(1), torch.ones(2), atol=1e-3)
    assert advantage[1].argmax() == 1


def test_equal_rewards_give_no_advantage():
    assert torch.equal(group_advantage(torch.full((4,), -0.3), 4), torch.zeros(4))
