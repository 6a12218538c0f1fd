import math

import pytest
import torch
from lens_runs import tiny_trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from consistency_lens.evaluation import EvaluationArguments, Evaluator
from consistency_lens.training.combinations import interim_figures
from consistency_lens.training.evaluation_callback import EvaluateLens, logged

OF_SPEED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
LORA = {"training": "lora", "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "stages": ["warm_start"], "per_device_eval_batch_size": 64}


def evaluator_of(trainer):
    arguments = EvaluationArguments(rows=12, controls=["mean", "shuffled"], disable_tqdm=True)
    return Evaluator(trainer.lens, trainer.eval_dataset, trainer.data_collator, arguments)


def evaluated_trainer(folder, lens_settings=None, **arguments):
    trainer = tiny_trainer(folder, lens_settings, **(EVALUATED | arguments))
    trainer.add_callback(EvaluateLens(trainer, evaluator_of(trainer)))
    return trainer


def entries(trainer, name):
    return [entry for entry in trainer.state.log_history if name in entry]


def test_figures_are_logged_at_every_evaluation(tmp_path):
    trainer = evaluated_trainer(tmp_path)
    trainer.train()
    figures = entries(trainer, "eval_fve")
    assert [entry["step"] for entry in figures] == [2, 4, 6]
    expected = evaluator_of(trainer)()
    assert figures[-1]["eval_fve"] == expected["fve"]
    assert figures[-1]["eval_kl_recovered"] == expected["kl_recovered"]
    assert figures[-1]["eval_shuffled_fve"] == expected["controls"]["shuffled"]["fve"]


def test_evaluate_returns_them_beside_the_loss(tmp_path):
    trainer = evaluated_trainer(tmp_path)
    metrics = trainer.evaluate()
    # and those of speed, which are of no lens
    assert metrics.keys() - {f"eval_{name}" for name in interim_figures()} <= {"epoch", *OF_SPEED}
    assert {f"eval_{name}" for name in interim_figures()} <= metrics.keys()
    assert metrics["eval_fve"] == evaluator_of(trainer)()["fve"]


class SpoilTheLens(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            with torch.no_grad():
                model.encoder.output_map.weight.mul_(10)


@pytest.mark.parametrize("clones", [{"training": "full"}, LORA], ids=lambda clones: clones["training"])
def test_the_best_checkpoint_is_that_of_the_best_fve_and_is_loaded(tmp_path, clones):
    trainer = evaluated_trainer(
        tmp_path, clones, eval_steps=1, save_strategy="steps", save_steps=1, max_steps=4,
        metric_for_best_model="fve", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.add_callback(SpoilTheLens())
    trainer.train()
    figures = entries(trainer, "eval_fve")
    best = max(figures, key=lambda entry: entry["eval_fve"])
    assert best["step"] < 4  # so that loading it changes the lens
    assert trainer.state.best_metric == best["eval_fve"]
    checkpoint = tmp_path / "run" / f"checkpoint-{best['step']}"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.lens.trained_tensors().items())


def test_training_does_not_notice(tmp_path):
    plain, evaluated = tiny_trainer(tmp_path / "plain", **EVALUATED), evaluated_trainer(tmp_path / "evaluated")
    plain.train()
    evaluated.train()
    losses = [[entry["loss"] for entry in entries(trainer, "loss")] for trainer in (plain, evaluated)]
    assert losses[0] == losses[1]


def test_the_progress_bar_is_interrupted_by_one_line(tmp_path, capsys):
    evaluated_trainer(tmp_path, disable_tqdm=False, max_steps=2).train()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "held out" in line)
    assert line.startswith("step 2, held out: FVE ") and "KL recovered" in line


def test_a_lens_that_is_not_finite_is_named_and_is_the_worst(tmp_path, caplog):
    trainer = evaluated_trainer(tmp_path, max_steps=2)
    with torch.no_grad():
        trainer.lens.encoder.output_map.bias[0] = float("nan")
    trainer.train()
    assert [entry["eval_fve"] for entry in entries(trainer, "eval_fve")] == [-math.inf]
    assert any("step 2: not evaluated: evaluation: " in record.message for record in caplog.records)


def test_only_single_numbers_are_logged():
    controls = {name: {"fve": 0.5, "kl_recovered": 0.25} for name in ("mean", "shuffled")}
    metrics = {"fve": 0.5, "rows": 3, "seconds": 1.0, "samples_per_second": 3.0, "ci95": {"fve": [0, 1]}}
    assert logged(metrics | {"controls": controls, "linear_probe": {"rows": [3]}}) == {
        "eval_fve": 0.5, "eval_shuffled_fve": 0.5, "eval_shuffled_kl_recovered": 0.25,
    }  # fmt: skip
