import json

import pytest
import torch

from consistency_lens.training.warm_start_end import WarmStartEnd


def make():
    return WarmStartEnd(
        None, torch.zeros(1, 1), lambda step: (0, 0), lambda reading: None, lambda: None, check_steps=2, patience=2
    )


@pytest.mark.parametrize("readings", [[], [0.5], [0.5, 0.4], [0.3, 0.2, 0.1]])
def test_readings_go_on_counting_behind_a_checkpoint(readings):
    undisturbed, resumed = make(), make()
    for step, reading in enumerate(readings):
        undisturbed.update(0, step, reading)
    resumed.load_state(json.loads(json.dumps(undisturbed.state())))
    stage = len(undisturbed.ends)  # the next one, if that has ended
    for step in (10, 12, 14):
        for warm_start_end in (undisturbed, resumed):
            if stage not in warm_start_end.ends:
                warm_start_end.update(stage, step, 0.45)
    assert resumed.ends == undisturbed.ends and stage in resumed.ends
    assert resumed.state() == undisturbed.state()
