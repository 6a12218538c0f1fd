import pytest

from consistency_lens.checkpoints.states import checkpoints_in
from consistency_lens.training.best_checkpoints import remove_others, steps_to_keep
from consistency_lens.training.early_stopping import evaluations_in_vain

NAN = float("nan")
FIGURES = {10: 0.1, 20: 0.5, 30: 0.3, 40: 0.5, 50: NAN}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"best": 0, "last": None}, {10, 20, 30, 40, 50, 60}),
        ({"best": 0, "last": 2}, {50, 60}),
        ({"best": 1, "last": None}, {20, 60}),  # the earlier of two equals, and the last
        ({"best": 3, "last": None}, {20, 30, 40, 60}),
        ({"best": 3, "last": 2}, {20, 30, 40, 50, 60}),
        ({"best": 9, "last": None}, {10, 20, 30, 40, 60}),  # one that was not measured, or to no end, is no best one
        ({"best": 1, "last": 0}, {20, 60}),
        ({"best": 2, "last": None, "greater_is_better": False}, {10, 30, 60}),
    ],
)
def test_the_best_and_the_last_stay(settings, kept):
    settings = {"greater_is_better": True, **settings}
    assert steps_to_keep([60, 10, 30, 20, 50, 40], FIGURES, **settings) == kept


def test_only_checkpoints_of_the_run_up_to_now_are_removed(tmp_path):
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-100", "data", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "leaving-checkpoint-5").mkdir()  # what a killed run was deleting
    remove_others(tmp_path, {20}, up_to=30)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-20", "checkpoint-100", "data", "checkpoint-x"}
    assert list(checkpoints_in(tmp_path)) == [20, 100]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-10").mkdir()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("consistency_lens.training.best_checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_others(tmp_path, set(), up_to=10)
    assert checkpoints_in(tmp_path) == {}


@pytest.mark.parametrize(
    ("values", "greater", "threshold", "in_vain"),
    [
        ([], True, 0, 0),
        ([0.1, 0.2, 0.3], True, 0, 0),
        ([0.1, 0.2, 0.2, 0.1], True, 0, 2),
        ([0.1, 0.3, 0.2, 0.4], True, 0, 0),
        ([3, 2, 1], False, 0, 0),
        ([3, 2, 2.5, 2], False, 0, 2),
        ([0.1, 0.15, 0.19, 0.21], True, 0.1, 0),  # small steps add up, for the best is where they began
        ([0.1, 0.15, 0.19], True, 0.1, 2),
        ([0.1, NAN, NAN], True, 0, 2),
        ([-float("inf"), 0.1], True, 0, 0),
        ([NAN, NAN], False, 0, 2),
    ],
)
def test_evaluations_in_vain(values, greater, threshold, in_vain):
    assert evaluations_in_vain(values, greater, threshold) == in_vain
