from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, WIDTH, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens import fitter as fitter_module
from consistency_lens.tuned_lens.fitter import TunedLensFitter, best_temperatures
from consistency_lens.tuned_lens.held_out import held_out_kl
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.moments import cut_to_rank
from consistency_lens.tuned_lens.residual_batches import Residuals, make_head, read_residuals
from consistency_lens.tuned_lens.streamed_kl import Head, read_teacher, streamed_kl

SEQ_LEN, BATCH = 20, 8
BASES = ("none", "whitening", "prism")


@cache
def learnable() -> PreTrainedModel:
    """A subject whose later blocks are affine maps of the normalised residual: MLPs without a nonlinearity, alone."""
    model = tiny_model("gpt2", activation_function="linear")
    with torch.no_grad():
        for block in model.transformer.h[1:]:
            block.attn.c_proj.weight.zero_()
            for parameter in block.mlp.parameters():
                parameter.mul_(0.6)
    return model


def text(blocks: int, seed: int = 0) -> torch.Tensor:
    return random_tokens(*[SEQ_LEN] * blocks, seed=seed)[0]


def residuals_of(lens: TunedLens, ids: torch.Tensor) -> Residuals:
    positions = torch.arange(SEQ_LEN).expand(len(ids), -1)
    return read_residuals(lens, ids, positions, range(lens.num_layers - 1))


def fitted(blocks: int = 32, ridge: float = 1e-2, model: PreTrainedModel | None = None, **settings) -> TunedLensFitter:
    """A fitter that has read some text; nothing is solved."""
    lens = TunedLens.for_model(model or learnable(), **settings)
    fitter = TunedLensFitter(lens, make_head(lens), ridge)
    for ids in text(blocks).split(BATCH):
        fitter.update(residuals_of(lens, ids))
    return fitter


def fresh_kl(lens: TunedLens, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Mean KL of each lens, (layers,), on text that no fit has seen."""
    blocks = (text(16, seed=5) if ids is None else ids).numpy()
    bounds = (0, blocks.shape[1])
    return held_out_kl(lens, make_head(lens), blocks, range(len(blocks)), bounds, positions=None).means


def mean_kl(logits: torch.Tensor, final: torch.Tensor) -> float:
    return kl_divergence(final, logits).mean().item()


@pytest.mark.parametrize(("rank", "share"), [(None, 0.06), (24, 0.06), (8, 0.15)])
def test_it_is_far_better_than_the_norm_lens_on_fresh_text(rank, share):
    fitter = fitted(rank=rank)
    fitter.solve()
    means = fresh_kl(fitter.lens)
    assert (means["tuned"] < share * means["calibrated"]).all()
    assert (means["calibrated"] <= means["norm"]).all()


def test_a_pretrained_model_is_read_far_better_than_by_the_norm_lens(stories260k: Path):
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    torch.manual_seed(0)
    start = torch.ones(160, 1, dtype=torch.long)
    ids = model.generate(start, attention_mask=start, do_sample=True, min_length=48, max_length=48)
    lens = TunedLens.for_model(model)
    fitter = TunedLensFitter(lens, make_head(lens))
    positions = torch.arange(8, 48).expand(BATCH, -1)
    for part in ids[:128].split(BATCH):
        fitter.update(read_residuals(lens, part, positions, range(4)))
    fitter.solve()
    means = fresh_kl(lens, ids[128:])
    assert (means["tuned"] < 0.9 * means["calibrated"]).all()
    assert means["tuned"].mean() < 0.4 * means["norm"].mean()


@pytest.mark.parametrize("rank", [None, WIDTH])
def test_every_basis_gives_the_same_lens_at_full_rank(rank):
    residual = learnable()(text(1), output_hidden_states=True).hidden_states[1].detach()[0]
    logits = []
    for basis in BASES:
        fitter = fitted(rank=rank, preconditioner=basis)
        fitter.solve()
        with torch.no_grad():
            logits.append([fitter.lens.logits(layer, residual) for layer in (0, 1)])
    for other in logits[1:]:
        for found, expected in zip(other, logits[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("basis", BASES)
def test_the_cut_is_the_same_in_every_basis(basis):
    fitter = fitted(rank=6, preconditioner=basis)
    fitter.solve()
    moments, translator = fitter._moments[0], fitter.lens.translators[0]
    U, V = cut_to_rank(moments.solve(1e-2).W, 6, moments.covariance, fitter.metric())
    hidden = residuals_of(fitter.lens, text(2, seed=3)).hidden[0].double()
    expected = hidden + hidden @ U @ V.T
    expected += moments.mean_y - moments.mean_x - moments.mean_x @ U @ V.T
    torch.testing.assert_close(fitter.lens.translate(0, hidden.float()).double(), expected, rtol=1e-3, atol=1e-3)
    assert translator.U.shape == (WIDTH, 6)


@torch.no_grad()
@pytest.mark.parametrize("basis", ["whitening", "prism"])
def test_a_fitted_basis_is_saved_and_undone(basis, tmp_path):
    fitter, residual = fitted(rank=6, preconditioner=basis), torch.randn(5, WIDTH)
    fitter.solve()
    assert (fitter.lens.preconditioner.scale - 1).abs().max() > 0.01
    fitter.lens.save_pretrained(tmp_path)
    loaded = TunedLens.from_pretrained(tmp_path, base_model=learnable())
    for layer in (0, 1):
        assert torch.equal(loaded.logits(layer, residual), fitter.lens.logits(layer, residual))


@torch.no_grad()
def test_a_huge_penalty_leaves_the_norm_lens_but_for_a_shift():
    fitter, hidden = fitted(ridge=1e9), torch.randn(5, WIDTH)
    fitter.solve()
    shift = fitter._moments[0].mean_y - fitter._moments[0].mean_x
    torch.testing.assert_close(fitter.lens.translate(0, hidden), hidden + shift.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_the_metric_is_the_hessian_of_the_kl(family, monkeypatch):
    monkeypatch.setattr(fitter_module, "METRIC_ROWS", 10)
    monkeypatch.setattr(fitter_module, "CHUNK_NUMBERS", 7 * WIDTH)  # the head in pieces, of which the last is shorter
    lens = TunedLens.for_model(tiny_model(family), rank=4)
    head = make_head(lens)
    assert (head.bias is None) == (family == "gpt2")
    fitter = TunedLensFitter(lens, head)
    for ids in text(4).split(3):  # two batches of different sizes
        fitter.update(residuals_of(lens, ids))
    final = residuals_of(lens, text(4)).final.double()
    final = torch.cat([final[:10], final[16::8]])  # the first ten rows, and every eighth of the others
    weight, bias = head.weight.double(), 0 if head.bias is None else head.bias.double()
    logits = final @ weight.T + bias

    log_p = logits.log_softmax(dim=-1)

    def kl(step: torch.Tensor) -> torch.Tensor:
        log_q = ((final + step) @ weight.T + bias).log_softmax(dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()

    hessian = torch.autograd.functional.hessian(kl, torch.zeros(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(fitter.metric(), hessian, rtol=1e-4, atol=1e-5)
    step = 1e-3 * torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert kl(step).item() == pytest.approx((step @ fitter.metric() @ step / 2).item(), rel=0.02)


def test_the_metric_makes_a_cut_better(monkeypatch):
    weighted, plain = fitted(rank=3), fitted(rank=3)
    monkeypatch.setattr(plain, "metric", lambda: torch.eye(WIDTH, dtype=torch.float64))
    for fitter in (weighted, plain):
        fitter.solve()
    assert (fresh_kl(weighted.lens)["tuned"] < fresh_kl(plain.lens)["tuned"]).all()


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"soft_cap": 3.0}])
def test_temperatures_equal_a_fine_grid(settings):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) / WIDTH**0.5
    bias = torch.randn(VOCAB_SIZE, generator=generator) if settings.get("bias") else None
    head = Head(weight, bias, settings.get("soft_cap"))
    final = 2 * torch.randn(50, WIDTH, generator=generator)
    noise = torch.randn(3, 50, WIDTH, generator=generator)
    hidden = torch.tensor([0.5, 1.0, 2.0])[:, None, None] * (final + noise)
    teacher = read_teacher(final, head)
    found = best_temperatures(hidden, teacher, head)
    grid = torch.logspace(-1, 1, 1001)
    kl = torch.stack([streamed_kl(hidden, tau.expand(3), teacher, head).mean(dim=1) for tau in grid])
    expected = grid[kl.argmin(dim=0)]
    assert (found / expected).log().abs().max() < 0.006  # one step of the grid is 0.0046
    assert found.diff().min() > 0.1 and 0.2 < found.min() and found.max() < 8
    assert (streamed_kl(hidden, found, teacher, head).mean(dim=1) <= kl.min(dim=0).values + 1e-5).all()


def test_temperatures_have_bounds():
    head, final = Head(torch.eye(4), None), torch.tensor([[1.0, 0, 0, 0]])
    hidden = torch.stack([1e-3 * final, -final])
    found = best_temperatures(hidden, read_teacher(final, head), head)
    torch.testing.assert_close(found, torch.tensor([0.1, 10.0]), rtol=1e-3, atol=0)


@torch.no_grad()
def test_both_lenses_are_calibrated_on_the_rows_and_the_last_layer_is_left():
    fitter = fitted(rank=6)
    fitter.solve()
    lens = fitter.lens
    assert lens.norm_temperature[-1] == 1 and (lens.norm_temperature[:-1] - 1).abs().min() > 0.01
    kept = fitter_module.concatenated(fitter._kept)
    assert kept.hidden.shape[1] == fitter_module.CALIBRATION_ROWS
    final = lens.readout.logits(kept.teacher.hidden)
    for layer in (0, 1):
        norm = lens.readout.logits(kept.hidden[layer])
        assert mean_kl(norm / lens.norm_temperature[layer], final) < mean_kl(norm, final)
        tuned = lens.readout.logits(lens.translate(layer, kept.hidden[layer]))
        best = mean_kl(tuned / lens.temperature(layer), final)
        assert all(best < mean_kl(tuned / (factor * lens.temperature(layer)), final) for factor in (0.97, 1.03))


def test_a_lens_without_temperatures_has_none_to_set():
    fitter = fitted(learn_temperature=False)
    fitter.solve()
    assert fitter.lens.temperature(0) == 1
    assert (fresh_kl(fitter.lens)["tuned"] < 0.2 * fresh_kl(fitter.lens)["calibrated"]).all()


@torch.no_grad()
def test_batches_make_no_difference():
    lenses = []
    for size in (4, 32):
        lens = TunedLens.for_model(learnable(), rank=6, preconditioner="prism")
        fitter = TunedLensFitter(lens, make_head(lens))
        for ids in text(16).split(size):
            fitter.update(residuals_of(lens, ids))
        assert fitter.rows == 16 * SEQ_LEN
        fitter.solve()
        lenses.append(lens)
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(lenses[0].translate(0, hidden), lenses[1].translate(0, hidden), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{"rank": 6, "preconditioner": "prism"}, {"rank": None}])
def test_saved_and_loaded_it_goes_on_bit_for_bit(settings, tmp_path):
    whole = fitted(**settings)
    lens = TunedLens.for_model(learnable(), **settings)
    first, second = (TunedLensFitter(lens, make_head(lens)) for _ in range(2))
    batches = [residuals_of(lens, ids) for ids in text(32).split(BATCH)]
    for batch in batches[:2]:
        first.update(batch)
    first.save(tmp_path / "moments.safetensors")
    second.load(tmp_path / "moments.safetensors")
    assert second.rows == 2 * BATCH * SEQ_LEN
    for batch in batches[2:]:
        second.update(batch)
    whole.solve()
    second.solve()
    for (name, found), expected in zip(lens.state_dict().items(), whole.lens.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def test_solved_twice_it_is_the_same():
    fitter = fitted(rank=6, preconditioner="prism")
    fitter.solve()
    once = {name: tensor.clone() for name, tensor in fitter.lens.state_dict().items()}
    fitter.solve()
    assert all(torch.equal(tensor, once[name]) for name, tensor in fitter.lens.state_dict().items())


def test_too_little_text_is_refused():
    fitter = fitted(blocks=1)
    assert fitter.rows == SEQ_LEN < WIDTH
    with pytest.raises(ValueError, match="ridge: 20 positions are too little text for 32 dimensions; raise tokens"):
        fitter.solve()


def test_wrong_settings_are_refused():
    before = TunedLens.for_model(learnable(), translator_place="before_norm")
    with pytest.raises(ValueError, match="before the norm have no closed form"):
        TunedLensFitter(before, make_head(before))
    lens = TunedLens.for_model(learnable())
    with pytest.raises(ValueError, match=r"ridge must be above 0, got 0\.0"):
        TunedLensFitter(lens, make_head(lens), ridge=0.0)


def test_a_head_in_bfloat16_gives_nearly_the_same_lens():
    exact = fitted(rank=6)
    lens = TunedLens.for_model(learnable(), rank=6)
    half = TunedLensFitter(lens, make_head(lens, "bfloat16"))
    for ids in text(32).split(BATCH):
        half.update(residuals_of(lens, ids))
    for fitter in (exact, half):
        fitter.solve()
    found, expected = fresh_kl(half.lens)["tuned"], fresh_kl(exact.lens)["tuned"]
    np.testing.assert_allclose(found, expected, rtol=0.05)
