"""The fast formulas against the plain ones that stand in their place."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from consistency_lens import losses, straight_through, table_product
from consistency_lens.plain_arithmetic import is_plain, plain_arithmetic
from consistency_lens.summed_gradient import SummedGradient
from consistency_lens.token_logits import TokenLogits

ROWS, VOCABULARY, WIDTH = 12, 50, 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradients(function, *inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    weights = random(*value.shape, seed=9)
    return value, *torch.autograd.grad((weights * value).sum(), inputs)


def assert_same_both_ways(function, *inputs):
    fast = value_and_gradients(function, *inputs)
    with plain_arithmetic():
        plain = value_and_gradients(function, *inputs)
    for one, other in zip(fast, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _fast_formulas_are_not_called_in_plain_arithmetic(monkeypatch):
    for function in (losses._RowLoss, straight_through._StraightThroughEmbeddings):
        monkeypatch.setattr(function, "apply", _only_outside(function.apply))


def _only_outside(apply):
    def called(*args):
        assert not is_plain()
        return apply(*args)

    return called


def test_losses_and_gradients_are_the_same():
    ids = torch.arange(ROWS)[None]
    assert_same_both_ways(losses.kl_divergence, random(ROWS, VOCABULARY), random(ROWS, VOCABULARY, seed=1))
    assert_same_both_ways(losses.entropy, random(ROWS, VOCABULARY))
    assert_same_both_ways(
        lambda logits: losses.token_cross_entropy(logits, ids, ids % 2 == 0), random(1, ROWS, VOCABULARY)
    )


def test_so_they_are_where_tokens_are_excluded_or_too_unlikely():
    p, q = random(ROWS, VOCABULARY), random(ROWS, VOCABULARY, seed=1)
    p[:, :3] = q[:, :2] = -torch.inf
    p[:, 4], q[:, 4] = -1e4, -torch.inf
    assert_same_both_ways(losses.kl_divergence, p, q)
    assert_same_both_ways(losses.entropy, p)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_embeddings_and_gradients_are_the_same(summed, noise):
    keys = straight_through.row_keys(0, 0, torch.arange(ROWS)) if noise else None
    ids = straight_through.sample_tokens(random(ROWS, VOCABULARY), keys)

    def embed(logits, *tables):
        sums = [SummedGradient(table) if summed else table for table in tables]
        return torch.stack(straight_through.straight_through_embeddings(logits, ids, keys, sums, 0.7))

    tables = random(VOCABULARY, WIDTH, seed=1), random(VOCABULARY, WIDTH, seed=2)
    assert_same_both_ways(embed, random(ROWS, VOCABULARY), *tables)


def test_a_value_is_the_row_of_the_table_to_the_bit():
    logits, table, ids = random(ROWS, VOCABULARY), random(VOCABULARY, WIDTH, seed=1).float(), torch.arange(ROWS)
    with plain_arithmetic():
        (embeddings,) = straight_through.straight_through_embeddings(logits.float(), ids, None, [table], 1.0)
    assert torch.equal(embeddings, table[ids])


def test_a_product_with_a_table_is_one_product(monkeypatch):
    monkeypatch.setattr(table_product, "BLOCK_ELEMENTS", 4 * WIDTH)
    rows, table = random(ROWS, WIDTH).float(), random(VOCABULARY, WIDTH, seed=1).float()
    in_blocks = table_product.table_product(rows, table)
    with plain_arithmetic():
        assert torch.equal(table_product.table_product(rows, table), rows @ table.T)
    torch.testing.assert_close(in_blocks, rows @ table.T)


@pytest.mark.parametrize("plain", [True, False])
def test_what_a_backward_pass_runs_again_goes_the_way_that_it_went(plain):
    keys = straight_through.row_keys(0, 0, torch.arange(ROWS))
    head, states = random(VOCABULARY, WIDTH), random(ROWS, WIDTH, seed=1).requires_grad_()
    ids = straight_through.sample_tokens((states @ head.T).detach(), keys)

    def read(logits, rows):
        (embedded,) = straight_through.straight_through_embeddings(logits, ids[rows], keys[rows], [head], 0.7)
        return {"loss": losses.entropy(logits) + embedded.square().sum(-1)}

    def total(chunk_size):
        given = states if chunk_size > 0 else states @ head.T
        return TokenLogits.of(given, lambda part: part @ head.T, chunk_size).read(read)["loss"].sum()

    (expected,) = torch.autograd.grad(total(0), states)
    with plain_arithmetic(plain):
        value = total(5)
    with plain_arithmetic(not plain):
        (gradient,) = torch.autograd.grad(value, states)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_it_is_of_its_thread_alone():
    with plain_arithmetic(), ThreadPoolExecutor(1) as pool:
        assert is_plain() and not pool.submit(is_plain).result()


def test_plain_arithmetic_ends_with_its_block():
    with pytest.raises(KeyError), plain_arithmetic():
        with plain_arithmetic():
            assert is_plain()
        assert is_plain()
        raise KeyError
    assert not is_plain()
