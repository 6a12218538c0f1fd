import math

import pytest
import torch
import torch.nn.functional as F
from flop_count import flops
from torch.utils.checkpoint import checkpoint

from consistency_lens import straight_through
from consistency_lens.straight_through import (
    fold_in,
    gumbel_noise,
    room_for_noise,
    row_keys,
    sample_tokens,
    straight_through_embedding,
    straight_through_embeddings,
)


def keys_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return row_keys(seed, step=0, rows=torch.arange(num_rows))


def reference_embedding(logits, token_ids, keys, table, tau):
    """The same thing as autograd would do it, one-hots and all."""
    noise = 0 if keys is None else gumbel_noise(keys, logits.shape[-1]).to(logits.dtype)
    soft = torch.softmax((logits + noise) / tau, dim=-1)
    hard = F.one_hot(token_ids, logits.shape[-1]).to(logits.dtype)
    return (hard - soft.detach() + soft) @ table


def embedding_and_gradients(embed, logits, token_ids, keys, table, tau, **options):
    logits, table = logits.clone().requires_grad_(), table.clone().requires_grad_()
    output = embed(logits, token_ids, keys, table, tau, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return output, *torch.autograd.grad((output * weights).sum(), [logits, table])


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(12, 50, generator=generator, dtype=torch.float64)
    table = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    keys = keys_of(12)
    return logits, sample_tokens(logits, keys), keys, table


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_value_and_gradients_equal_the_one_hot_reference(problem, tau, chunk_size):
    expected = embedding_and_gradients(reference_embedding, *problem, tau)
    got = embedding_and_gradients(straight_through_embedding, *problem, tau, chunk_size=chunk_size)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)])
def test_several_tables_have_the_gradients_of_one_after_the_other(problem, shared, read):
    logits, token_ids, keys, first = problem
    first = first.clone().requires_grad_()
    tables = [first, first if shared else (first.detach() + 1).requires_grad_()]
    weights = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def results(embed_all):
        given = logits.clone().requires_grad_()
        embedded = embed_all(given)
        loss = sum((embedded[i] * weights[i]).sum() for i in read)
        return *embedded, *torch.autograd.grad(loss, [given, *(tables[i] for i in read)])

    together = results(lambda given: straight_through_embeddings(given, token_ids, keys, tables, 0.7))
    apart = results(lambda given: [straight_through_embedding(given, token_ids, keys, table, 0.7) for table in tables])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_table_that_is_given_twice_is_multiplied_once(problem, checkpointed):
    logits, token_ids, keys, table = problem
    counts = []
    for tables in ([table], [table, table], [table, table + 1]):
        given = logits.clone().requires_grad_()
        arguments = (given, token_ids, keys, tables, 0.7)
        embedded = (
            checkpoint(straight_through_embeddings, *arguments, use_reentrant=False)
            if checkpointed
            else straight_through_embeddings(*arguments)
        )
        counts.append(flops(lambda embedded=embedded: sum(embedded).sum().backward()))
    assert counts == [counts[0], counts[0], 2 * counts[0]]


def test_without_keys_the_gradient_is_that_of_the_plain_softmax(problem):
    logits, _, _, table = problem
    greedy = sample_tokens(logits, None)
    assert torch.equal(greedy, logits.argmax(dim=-1))
    expected = embedding_and_gradients(reference_embedding, logits, greedy, None, table, 0.7)
    got = embedding_and_gradients(straight_through_embedding, logits, greedy, None, table, 0.7)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_tau_changes_the_gradient_and_nothing_else(problem):
    sharp = embedding_and_gradients(straight_through_embedding, *problem, 0.2)
    soft = embedding_and_gradients(straight_through_embedding, *problem, 2.0)
    assert torch.equal(sharp[0], soft[0])
    assert torch.equal(sharp[2], soft[2])
    assert not torch.allclose(sharp[1], soft[1], rtol=0.1)


def test_the_value_is_the_table_row_to_the_bit(problem):
    logits, token_ids, keys, table = problem
    assert torch.equal(straight_through_embedding(logits, token_ids, keys, table, 1.0), table[token_ids])


def test_a_frozen_table_gets_no_gradient(problem):
    logits, token_ids, keys, table = problem
    logits.requires_grad_()
    straight_through_embedding(logits, token_ids, keys, table, 1.0).sum().backward()
    assert table.grad is None
    assert logits.grad.abs().sum() > 0


def test_nothing_of_the_logits_size_is_kept_but_the_logits(problem):
    logits, token_ids, keys, table = problem
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        straight_through_embedding(logits, token_ids, keys, table, 1.0)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_noise_that_is_kept_is_not_made_again_and_takes_the_place_of_the_logits(problem, tau, monkeypatch):
    logits, keys, table = problem[0].float().requires_grad_(), problem[2], problem[3].float()
    noisy = room_for_noise(logits, keys, temperature=1.0)
    token_ids = sample_tokens(logits, keys, noisy=noisy)
    assert torch.equal(token_ids, sample_tokens(logits, keys))
    expected = embedding_and_gradients(straight_through_embedding, logits.detach(), token_ids, keys, table, tau)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        got, _ = straight_through_embeddings(logits, token_ids, keys, [table, table], tau, noisy=noisy)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [noisy.data_ptr()]
    monkeypatch.setattr(straight_through, "_negative_noise", None)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.autograd.grad((got * weights).sum(), logits)[0], expected[1])


def test_noise_is_kept_only_where_that_takes_no_more_memory():
    logits, keys = torch.zeros(2, 5), keys_of(2)
    assert room_for_noise(logits, keys, 1.0).shape == (2, 5)
    assert room_for_noise(logits, None, 1.0) is room_for_noise(logits, keys, 0.7) is None
    assert room_for_noise(logits.bfloat16(), keys, 1.0) is None
    with torch.no_grad():
        assert room_for_noise(logits, keys, 1.0) is None


@pytest.mark.parametrize("backward_inside", [False, True])
def test_bfloat16_autocast_agrees_with_the_reference_under_autocast(problem, backward_inside):
    logits, token_ids, keys, table = (tensor.float() if tensor.is_floating_point() else tensor for tensor in problem)
    hidden = torch.randn(12, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    head = torch.linalg.lstsq(hidden.detach(), logits).solution
    gradients = []
    for embed in (straight_through_embedding, reference_embedding):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = hidden @ head
            assert low.dtype == torch.bfloat16
            output = embed(low, token_ids, keys, table, 1.0).float().square().sum()
            gradients += torch.autograd.grad(output, hidden) if backward_inside else []
        gradients += [] if backward_inside else torch.autograd.grad(output, hidden)
    ours, theirs = gradients
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_noise_is_that_of_the_key_alone():
    keys = keys_of(40)
    noise = gumbel_noise(keys, 1000)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gumbel_noise(keys[order][:7], 1000), noise[order][:7], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gumbel_noise(keys, 77), noise[:, :77], rtol=1e-6, atol=1e-6)


def test_noise_is_the_same_for_ever():
    # Numbers of the first release: a change of the hash would change every run that is resumed.
    noise = gumbel_noise(row_keys(1, 2, torch.tensor([3]), draw=4), 4)
    torch.testing.assert_close(noise, torch.tensor([[0.124456, 0.131532, 1.924605, 0.107544]]), rtol=1e-5, atol=1e-5)


def test_tokens_do_not_depend_on_batch_or_chunks():
    logits, keys = torch.randn(33, 200, generator=torch.Generator().manual_seed(0)), keys_of(33)
    together = sample_tokens(logits, keys)
    assert torch.equal(sample_tokens(logits, keys, chunk_size=4), together)
    halves = [sample_tokens(logits[rows], keys[rows]) for rows in (slice(20), slice(20, None))]
    assert torch.equal(torch.cat(halves), together)


def test_noise_has_the_moments_of_a_gumbel_distribution():
    noise = gumbel_noise(keys_of(500), 4000).double()
    count = noise.numel()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.577216, abs=5 * math.sqrt(math.pi**2 / 6 / count))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)
    # the far tail, which decides who wins: P(g > 8) = 1 - exp(-exp(-8))
    tail = 1 - math.exp(-math.exp(-8))
    assert (noise > 8).sum().item() == pytest.approx(count * tail, abs=5 * math.sqrt(count * tail))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The statistic in standard deviations from its mean: beyond 5 would be a wonder."""
    degrees = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - degrees) / math.sqrt(2 * degrees)


def uniforms(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return torch.exp(-torch.exp(-gumbel_noise(keys, vocab_size).double()))


@pytest.mark.parametrize("keys", [keys_of(1000), *(torch.arange(1000) << bits for bits in (0, 31, 53))])
@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 2), (0, 256), (256, 0)])
def test_neighbouring_keys_and_indices_are_independent(keys, shift):
    # pairs of neighbours fall evenly on a 16 x 16 grid, even for keys that nothing has mixed
    cells = (uniforms(keys, 1024) * 16).long().clamp(max=15)
    rows, columns = shift
    pairs = 16 * cells[: len(cells) - rows, : 1024 - columns] + cells[rows:, columns:]
    counts = torch.bincount(pairs.flatten(), minlength=256).double()
    assert abs(chi_square(counts, torch.full_like(counts, pairs.numel() / 256))) < 6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_samples_follow_the_softmax(temperature):
    logits = 1.5 * torch.randn(30, generator=torch.Generator().manual_seed(3))
    tokens = sample_tokens(logits.expand(100_000, 30), keys_of(100_000), temperature)
    expected = 100_000 * torch.softmax(logits.double() / temperature, dim=-1)
    counts = torch.bincount(tokens, minlength=30).double()
    common = expected > 5
    assert abs(chi_square(counts[common], expected[common])) < 5


def test_a_token_at_minus_infinity_is_never_drawn_and_gets_no_gradient():
    logits = torch.zeros(2000, 4)
    logits[:, 1] = -torch.inf
    keys = keys_of(2000)
    tokens = sample_tokens(logits, keys)
    assert set(tokens.tolist()) == {0, 2, 3}
    logits.requires_grad_()
    straight_through_embedding(logits, tokens, keys, torch.randn(4, 3), 1.0).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 1] == 0).all()


def test_keys_differ_by_seed_step_row_and_draw():
    rows = torch.arange(1000)
    streams = [row_keys(seed, step, rows, draw) for seed in range(5) for step in range(5) for draw in range(5)]
    streams += [fold_in(streams[0], position) for position in range(5)]
    assert torch.cat(streams).unique().numel() == 130 * 1000


def test_folding_in_a_table_of_positions_equals_one_position_at_a_time():
    keys = keys_of(5)
    table = fold_in(keys[:, None], torch.arange(3))
    assert torch.equal(table, torch.stack([fold_in(keys, position) for position in range(3)], dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": math.nan}, "tau must be positive"),
        ({"table": torch.zeros(9, 8)}, r"one row for each of the 50 logits, got shape \(9, 8\)"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys must be of shape \(12,\), got \(3,\)"),
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, r"token_ids must be of shape \(12,\), got \(3,\)"),
        ({"logits": torch.zeros(2, 3, 4)}, r"logits must be of shape \(rows, vocabulary\), got \(2, 3, 4\)"),
    ],
)
def test_wrong_arguments_are_named(problem, change, message):
    arguments = dict(zip(("logits", "token_ids", "keys", "table"), problem, strict=True)) | {"tau": 1.0} | change
    with pytest.raises(ValueError, match=message):
        straight_through_embedding(**arguments)


def test_a_temperature_of_zero_points_to_greedy_sampling():
    with pytest.raises(ValueError, match="keys=None for the most likely token"):
        sample_tokens(torch.zeros(1, 2), keys_of(1), temperature=0.0)


@pytest.mark.gpu
def test_the_gpu_draws_the_tokens_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    keys, logits = keys_of(64), torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gumbel_noise(keys.cuda(), 5000).cpu(), gumbel_noise(keys, 5000), rtol=1e-5, atol=1e-5)
    assert torch.equal(sample_tokens(logits.cuda(), keys.cuda()).cpu(), sample_tokens(logits, keys))
