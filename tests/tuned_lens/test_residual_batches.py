import numpy as np
import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB_SIZE, WIDTH, random_tokens, tiny_model
from tiny_tuned_lenses import tiny_tuned_lens

from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.residual_batches import (
    BFLOAT16_INSTRUCTIONS,
    LARGE_VOCABULARY,
    Residuals,
    has_fast_bfloat16,
    make_head,
    position_bounds,
    read_batch,
    sampled_positions,
    vocabulary_budget,
)

BOUNDS = (6, 16)
SEED = 316


def test_positions_depend_on_seed_epoch_and_row_alone():
    rows = [5, 0, 123456]
    drawn = sampled_positions(rows, 4, BOUNDS, SEED, epoch=2)
    assert drawn.dtype == torch.int64 and drawn.shape == (3, 4)
    torch.manual_seed(9)
    np.random.seed(9)
    for row, expected in zip(rows, drawn, strict=True):
        assert torch.equal(sampled_positions([row], 4, BOUNDS, SEED, epoch=2)[0], expected)
    for other in ([1, 2, 3], 4, BOUNDS, SEED, 2), (rows, 4, BOUNDS, SEED, 3), (rows, 4, BOUNDS, SEED + 1, 2):
        assert not torch.equal(sampled_positions(*other), drawn)


def test_positions_lie_within_bounds_none_twice_and_each_is_drawn_sometime():
    drawn = sampled_positions(range(100), 4, BOUNDS, SEED)
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert drawn.unique().tolist() == list(range(*BOUNDS))
    shares = drawn.flatten().bincount()[BOUNDS[0] :] / 40  # 1 where all are alike
    assert shares.min() > 0.6 and shares.max() < 1.4


@pytest.mark.parametrize("count", [None, 10, 11])
def test_all_positions_where_so_many_are_asked_for(count):
    drawn = sampled_positions([7, 8], count, BOUNDS, SEED)
    assert drawn.sort(dim=1).values.tolist() == [list(range(*BOUNDS))] * 2
    assert not torch.equal(*drawn)  # in an order of their own, for steps take them in parts


@pytest.mark.parametrize(
    ("share", "seq_len", "bounds"),
    [((0.6, 0.95), 512, (307, 486)), ((0.0, 1.0), 7, (0, 7)), ((0.5, 1.0), 10, (5, 10)), ((0.6, 0.95), 4, (2, 3))],
)
def test_bounds_are_a_share_of_the_context(share, seq_len, bounds):
    assert position_bounds(share, seq_len) == bounds


@pytest.mark.parametrize("share", [(0.6, 0.65), (0.9, 0.5), (0.5, 1.2), (-0.2, 0.5)])
def test_bounds_without_a_position_are_refused(share):
    with pytest.raises(ValueError, match="position_range: .* of 10 tokens holds no position; try 0.6 0.95"):
        position_bounds(share, 10)


@pytest.mark.parametrize(
    ("vocab_size", "num_layers", "budget"),
    [
        (32_000, 32, (24, 16)),
        (512, 32, (24, 16)),  # no more for small vocabularies
        (128_256, 32, (12, 12)),
        (151_936, 36, (11, 12)),
        (256_000, 42, (8, 12)),
        (10_000_000, 80, (8, 12)),
        (32_000, 5, (4, 16)),
        (256_000, 5, (4, 12)),
        (50_257, 12, (11, 13)),
    ],
)
def test_budgets_are_those_of_the_plan(vocab_size, num_layers, budget):
    assert vocabulary_budget(vocab_size, num_layers) == budget


def test_a_head_is_the_subjects_own():
    lens = tiny_tuned_lens("phi")
    head = make_head(lens)
    assert head.weight.dtype == torch.float32 and torch.equal(head.weight, lens.subject_model.lm_head.weight)
    assert torch.equal(head.bias, lens.subject_model.lm_head.bias) and head.soft_cap is None
    assert make_head(tiny_tuned_lens("gemma2")).soft_cap == 30.0


@pytest.mark.parametrize("instructions", [None, *BFLOAT16_INSTRUCTIONS])
def test_a_head_of_a_large_vocabulary_is_multiplied_in_bfloat16_where_that_is_fast(monkeypatch, instructions):
    found = dict.fromkeys(BFLOAT16_INSTRUCTIONS, False) | {"avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | ({instructions: True} if instructions else {}))
    small = tiny_tuned_lens("phi")
    large = TunedLens.for_model(tiny_model("llama", vocab_size=LARGE_VOCABULARY, num_hidden_layers=2))
    dtypes = {
        (name, dtype): make_head(lens, dtype).weight.dtype
        for name, lens in (("small", small), ("large", large))
        for dtype in ("auto", "float32", "bfloat16")
    }
    half = {("small", "bfloat16"), ("large", "bfloat16")} | ({("large", "auto")} if instructions else set())
    assert {key for key, dtype in dtypes.items() if dtype == torch.bfloat16} == half
    assert make_head(small, "bfloat16").bias.dtype == torch.float32


def test_a_gpu_is_fast_in_bfloat16_whatever_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert has_fast_bfloat16(torch.device("cuda")) and not has_fast_bfloat16(torch.device("cpu"))


def test_a_torch_that_cannot_tell_has_no_fast_bfloat16_on_a_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_fast_bfloat16(torch.device("cpu"))


def test_rows_are_spread_over_a_batch():
    final = torch.arange(100.0)[:, None].expand(100, 3)
    residuals = Residuals(torch.stack([final, -final]), final)
    found = residuals.spread(7)
    assert found.final[:, 0].tolist() == [0, 14, 28, 42, 57, 71, 85]
    assert torch.equal(found.hidden, torch.stack([found.final, -found.final]))
    assert all(torch.equal(one, other) for one, other in zip(residuals.spread(1000), residuals, strict=True))


@pytest.mark.parametrize("place", ["after_norm", "before_norm"])
def test_a_batch_holds_residuals_and_the_final_distribution_at_the_positions(place):
    model = tiny_model("gpt2")
    lens = TunedLens.for_model(model, translator_place=place)
    input_ids, _ = random_tokens(9, 9)
    positions = torch.tensor([[2, 5, 8], [1, 3, 4]])
    found = read_batch(lens, make_head(lens), input_ids, positions, [0, 1])
    residuals = lens.residuals(input_ids)
    chosen = torch.stack([residuals[:2, row, positions[row]] for row in (0, 1)], dim=1).flatten(1, 2)
    assert found.hidden.shape == (NUM_LAYERS - 1, 6, WIDTH)
    expected = chosen if place == "before_norm" else model.transformer.ln_f(chosen)
    torch.testing.assert_close(found.hidden, expected)
    logits = torch.stack([model(input_ids).logits[row, positions[row]] for row in (0, 1)]).flatten(0, 1)
    assert logits.shape == (6, VOCAB_SIZE)
    torch.testing.assert_close(found.teacher.lse, logits.logsumexp(dim=-1))
    entropy = -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
    torch.testing.assert_close(-found.teacher.negative_entropy, entropy, rtol=1e-4, atol=1e-5)


def test_a_batch_of_some_layers_has_those():
    lens = tiny_tuned_lens()
    input_ids, _ = random_tokens(9)
    positions = torch.tensor([[3]])
    every, one = (read_batch(lens, make_head(lens), input_ids, positions, layers) for layers in ([0, 1], [1]))
    assert torch.equal(one.hidden, every.hidden[1:])
