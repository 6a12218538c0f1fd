from consistency_lens.report.curves import POINTS, curves
from consistency_lens.report.run_folder import RunFolder


def run(log, **training):
    return RunFolder(path=None, log=log, run={"training": training})


def test_lines_stages_and_charts():
    log = [
        {"step": 10, "loss": 3.0, "ce": 2.5, "mse": 1.0, "stage": 1},
        {"step": 10, "eval_fve": 0.1},
        {"step": 20, "ce": 2.0, "mse": 0.9, "stage": 1, "grad_norm": None},
        {"step": 20, "eval_fve": 0.2},
        {"step": 30, "reward": -0.5, "mse": None, "stage": 2},
        {"step": 40, "reward": -0.4, "mse": 0.5, "stage": 2},
        {"train_runtime": 5.0, "step": 40},
    ]
    found = curves(run(log, stages=["warm_start 60%", "policy_gradient"]))
    lines = {(chart["title"], line["label"]): line["points"] for chart in found["charts"] for line in chart["lines"]}
    assert lines["held-out rows", "FVE"] == [[10, 0.1], [20, 0.2]]
    assert lines["reward", "mean"] == [[30, -0.5], [40, -0.4]]
    errors = next(points for (_, label), points in lines.items() if label == "all texts")
    assert errors == [[10, 1.0], [20, 0.9], [40, 0.5]]
    assert found["stages"] == [{"label": "warm start", "start": 0}, {"label": "policy gradient", "start": 20}]


def test_long_curves_are_thinned_out_to_their_end():
    found = curves(run([{"step": step, "ce": 1.0} for step in range(10 * POINTS + 1)]))
    ((line,),) = (chart["lines"] for chart in found["charts"])
    assert len(line["points"]) <= POINTS and line["points"][-1][0] == 10 * POINTS


def test_a_log_without_curves():
    assert curves(run([{"step": 1, "train_runtime": 2.0}])) is None
    assert curves(run([])) is None
