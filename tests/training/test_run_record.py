import json

import pytest

from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.recipe_arguments import RecipeArguments
from consistency_lens.training.run_record import non_default, run_record

TOKEN = "hf_planted_token"


@pytest.fixture
def training(tmp_path):
    return ConsistencyLensTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", learning_rate=2e-3, lm_weight=["0.2"], hub_token=TOKEN,
        per_device_train_batch_size=4, gradient_accumulation_steps=3, stages=["warm_start 5s", "gumbel"],
    )  # fmt: skip


def test_defaults_and_what_the_machine_sets_are_left_out(tmp_path):
    assert non_default(ConsistencyLensTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")) == {}
    assert non_default(RecipeArguments(model="m")) == {"model": "m"}


def test_the_record_says_what_was_given_and_what_it_took(training):
    recipe = RecipeArguments(model="m", layer=0, eval_checks=["best_of_n"])
    record = json.loads(json.dumps(run_record(recipe, training, 17, {"training": 2.0, "evaluation": 0.5})))
    assert record["seconds"] == 2.5 and record["steps"] == 17 and record["rows_per_step"] == 12
    assert record["machine"].keys() == {"cpu_cores", "threads", "device", "processes"}
    assert record["non_default"] == {
        "model": "m", "layer": 0, "eval_checks": ["best_of_n"], "learning_rate": 2e-3, "lm_weight": ["0.2"],
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "stages": ["warm_start 5s", "gumbel"],
    }  # fmt: skip
    assert TOKEN not in json.dumps(record)
