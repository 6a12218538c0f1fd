from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from consistency_lens.training.callbacks import OrderOfEpoch, SkipNonfiniteSteps
from consistency_lens.training.nonfinite import NonfiniteGradientsError


def test_only_steps_that_are_skipped_in_a_row_stop_a_run():
    skipper, model = SkipNonfiniteSteps(limit=2), torch.nn.Linear(1, 1)

    def step(gradient):
        model.weight.grad = torch.full((1, 1), gradient)
        skipper.on_pre_optimizer_step(None, TrainerState(), None, model=model)
        return model.weight.grad is None

    nan, inf = float("nan"), float("inf")
    assert [step(gradient) for gradient in (nan, 1.0, inf, 1.0, nan)] == [True, False, True, False, True]
    assert skipper.skipped == 3
    with pytest.raises(NonfiniteGradientsError, match="2 steps in a row"):
        step(nan)


@pytest.mark.parametrize(("epoch", "told"), [(0, 0), (1.0, 1), (2 - 1e-9, 2), (2.5, 2)])
def test_a_sampler_is_told_the_epoch_that_begins(epoch, told):
    epochs = []
    sampler = SimpleNamespace(set_epoch=epochs.append)
    OrderOfEpoch(lambda: sampler).on_epoch_begin(None, TrainerState(epoch=epoch), None)
    OrderOfEpoch(lambda: None).on_epoch_begin(None, TrainerState(epoch=epoch), None)
    assert epochs == [told]
