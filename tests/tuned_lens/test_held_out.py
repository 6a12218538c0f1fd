import numpy as np
import pytest
import torch
from tiny_models import NUM_LAYERS, random_tokens
from tiny_tuned_lenses import tiny_tuned_lens

from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens.held_out import LENSES, HeldOutKL, held_out_kl
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.residual_batches import make_head, sampled_positions

BLOCKS = random_tokens(*[12] * 5)[0].numpy().astype(np.uint16)
BOUNDS = (4, 11)


def before_norm(lens: TunedLens) -> TunedLens:
    """The same translators, read before the norm."""
    lens.config.translator_place = "before_norm"
    return lens


def read(lens: TunedLens, rows=range(5), **settings) -> HeldOutKL:
    return held_out_kl(lens, make_head(lens), BLOCKS, rows, BOUNDS, **settings)


@torch.no_grad()
def direct(lens: TunedLens, rows, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by way of the lens's own logits and the model's, (layers,) each."""
    ids = torch.from_numpy(BLOCKS[list(rows)].astype(np.int64))
    final, residuals = lens.subject_model(ids).logits, lens.residuals(ids)
    means = {}
    for name in LENSES:
        kl = []
        for layer in range(NUM_LAYERS - 1):
            if name == "tuned":
                logits = lens.logits(layer, residuals[layer])
            else:
                logits = lens.logit_lens(layer, residuals[layer], calibrated=name == "calibrated")
            kl.append(kl_divergence(final, logits).gather(1, positions).mean())
        means[name] = torch.stack(kl)
    return means


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("place", ["after_norm", "before_norm"])
def test_it_is_the_kl_of_the_logits(family, place):
    lens = tiny_tuned_lens(family, **({"final_logit_softcapping": 2.0} if family == "gemma2" else {}))
    lens = lens if place == "after_norm" else before_norm(lens)
    found = read(lens, positions=None)
    assert found.positions == 5 * 7 and found.layers == [0, 1]
    expected = direct(lens, range(5), torch.arange(*BOUNDS).expand(5, -1))
    for name in LENSES:
        torch.testing.assert_close(found.means[name].float(), expected[name], rtol=1e-4, atol=1e-5)
    assert len({float(means.mean()) for means in found.means.values()}) == 3  # three lenses that differ


def test_positions_are_drawn_by_the_blocks_number():
    lens, rows = tiny_tuned_lens(), [4, 1]
    found = read(lens, rows, positions=3, seed=9)
    expected = direct(lens, rows, sampled_positions(rows, 3, BOUNDS, seed=9))
    assert found.positions == 6
    torch.testing.assert_close(found.means["tuned"].float(), expected["tuned"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(read(lens, rows, positions=3, seed=10).means["tuned"], found.means["tuned"])


def test_batches_and_processes_make_no_difference():
    lens = tiny_tuned_lens()
    whole = read(lens, positions=4, batch_size=5)
    parts = [read(lens, range(5)[rank::2], positions=4, batch_size=2) for rank in (0, 1)]
    assert sum(part.positions for part in parts) == whole.positions == 20
    for name in LENSES:
        torch.testing.assert_close(sum(part.sums[name] for part in parts), whole.sums[name], rtol=1e-5, atol=1e-5)


def test_some_layers_and_lenses():
    lens = tiny_tuned_lens()
    every, one = read(lens), read(lens, layers=[1], lenses=("calibrated",))
    assert list(one.sums) == ["calibrated"] and one.layers == [1]
    torch.testing.assert_close(one.means["calibrated"], every.means["calibrated"][1:])


def test_metrics_are_in_nats_but_where_they_say_bits():
    # of 8 blocks, 7 have a translator; a quarter, half and three quarters of the depth are layers 1, 3 and 5
    nats = torch.log(torch.tensor(2.0, dtype=torch.float64)) * torch.arange(1.0, 8.0, dtype=torch.float64)
    sums = {"tuned": 10 * nats, "norm": 20 * nats, "calibrated": 15 * nats}
    metrics = HeldOutKL(sums, list(range(7)), positions=10).metrics()
    assert metrics["layers@{25,50,75}%"] == [1, 3, 5]
    assert metrics["val_kl_bits@{25,50,75}%"] == pytest.approx([2, 4, 6])
    assert metrics["val_norm_kl_bits@{25,50,75}%"] == pytest.approx([4, 8, 12])
    assert metrics["kl"]["calibrated"] == pytest.approx((1.5 * nats).tolist())
    assert metrics["mean_kl"] == pytest.approx({name: scale * 4 * nats[0].item() for name, scale in
                                                (("tuned", 1), ("norm", 2), ("calibrated", 1.5))})  # fmt: skip
    assert metrics["positions"] == 10
