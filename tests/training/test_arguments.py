import pytest

from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.recipe_arguments import RecipeArguments


def arguments(tmp_path, **settings):
    return ConsistencyLensTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


MEASURED = {"metric_for_best_model": "fve", "eval_strategy": "steps", "eval_steps": 20, "save_steps": 40}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "stages: got none"),
        ({"stages": ["warm up"]}, "stages: each is"),
        ({"stages": ["warm_start", "gumbel"]}, "needs a duration"),
        ({"stages": ["gumbel"], "lm_reference": "warm_start"}, "needs a warm_start stage"),
        ({"tau": "linear 1 to 0"}, "^tau: not a schedule"),
        ({"kl_weight": "soon"}, "^kl_weight: not a schedule"),
        ({"lm_reference": "gpt"}, "lm_reference must be one of"),
        ({"lm_direction": "up"}, "lm_direction must be one of"),
        ({"delta_residual": "yes"}, "delta_residual must be one of"),
        ({"own_share": 1.5}, "own_share must lie in 0..1"),
        ({"shorter_share": -0.5}, "shorter_share must lie in 0..1"),
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"reward": "fluency"}, "reward must be one of -mse, -log_mse, -kl, got 'fluency'"),
        ({"lm_estimator": "k2"}, "lm_estimator must be one of exact, k3"),
        ({"length_penalty": -1.0}, "length_penalty must be 0 or more"),
        ({"logits_chunk_size": -1}, "logits_chunk_size must be 0 or more, got -1"),
        ({"length_penalty": 0.1}, "teaches to stop by shorter tails"),
        ({"length_penalty": 0.1, "shorter_share": 1.0, "prefix_budgets": True}, "leave one out"),
        ({"lm_estimator": "k3", "lm_direction": "forward"}, "set lm_direction to reverse"),
        ({"tau": "linear 1 -> 0"}, "tau must stay positive"),
        ({"kl_weight": ["1", "2", "3"]}, "kl_weight: got 3 schedules for 2 stages"),
        ({"stages": ["warm_start 60x", "gumbel"]}, "^stages: not a duration"),
        ({"unfreeze": ["base 9x"]}, "^unfreeze: not a duration"),
        ({"num_train_epochs": 0}, "^num_train_epochs must be above 0, got 0"),
        ({"save_strategy": "best"}, "^save_strategy: needs metric_for_best_model"),
        ({"learning_rate": -1e-3}, "^learning_rate must be 0 or more, got -0.001"),
        ({"encoder_learning_rate": float("nan")}, "^encoder_learning_rate must be 0 or more, got nan"),
        ({"learning_rate": float("inf")}, "^learning_rate must be finite, got inf"),
        ({"weight_decay": float("nan")}, "^weight_decay must be 0 or more, got nan"),
        ({"adam_beta2": 1.0}, "^adam_beta2 must be 0 or more and below 1, got 1.0"),
        ({"adam_epsilon": 0.0}, "^adam_epsilon must be above 0, got 0.0; 1e-8 is usual"),
        ({"max_grad_norm": float("inf")}, "^max_grad_norm must be finite, got inf"),
        ({"warmup_steps": float("inf")}, "^warmup_steps must be finite, got inf"),
        ({"seed": -1}, "^seed must lie in 0..4294967295, got -1"),
        ({"gradient_accumulation_steps": 0}, "^gradient_accumulation_steps must be 1 or more, got 0"),
        ({"per_device_train_batch_size": -1}, "^per_device_train_batch_size must be 1 or more, got -1"),
        ({"dataloader_num_workers": -1}, "^dataloader_num_workers must be 0 or more, got -1"),
        ({"stages": ["warm_start 60%", "gumbel 40%"]}, "the last runs to the end"),
        ({"stages": [""]}, "stages: each is"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 500}, "set metric_for_best_model"),
        ({"stages": ["warm_start"], "warm_start_patience": 1}, "no stage follows a warm start"),
        ({"warm_start_patience": 1, "warm_start_check_steps": 0}, "warm_start_check_steps must be 1 or more"),
        ({"learning_rate_schedule": ["1"]}, "give one each"),
        ({"keep_best": 1}, "keep_best: needs metric_for_best_model"),
        ({"keep_best": -1}, "keep_best must be 0 or more, got -1"),
        ({"early_stopping_patience": 1, "metric_for_best_model": "fve"}, "early_stopping_patience: needs evaluations"),
        (
            {"keep_best": 1, **MEASURED, "metric_for_best_model": "eval_loss"},
            "keep_best: the loss is another one in each",
        ),
        ({"keep_best": 1, **MEASURED, "save_strategy": "epoch"}, "every checkpoint needs an evaluation of its own"),
        ({"keep_best": 1, **MEASURED, "save_steps": 30}, "every checkpoint needs an evaluation of its own"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        arguments(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_a_hundred_skipped_steps_in_a_row_end_a_run_by_default(tmp_path):
    assert arguments(tmp_path).max_nonfinite_steps == 100


def test_stage_starts(tmp_path):
    args = arguments(tmp_path, stages=["warm_start 30%", "gumbel"])
    assert args.stage_starts(steps_per_epoch=10, total_steps=100) == [0, 30]
    args = arguments(tmp_path, stages=["warm_start 2e", "gumbel"])
    assert args.stage_starts(steps_per_epoch=10, total_steps=100) == [0, 20]


def test_stages_that_use_up_the_run_are_an_error(tmp_path):
    args = arguments(tmp_path, stages=["warm_start 100s", "gumbel"])
    with pytest.raises(ValueError, match="step 100 of 100"):
        args.stage_starts(steps_per_epoch=10, total_steps=100)


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({"stages": ["warm_start 30%", "gumbel"]}, True),
        ({"stages": ["warm_start 30%", "gumbel 50%", "warm_start"]}, True),
        ({"stages": ["warm_start"]}, False),
        ({"stages": ["warm_start 30%", "gumbel"], "lm_weight": ["1", "0"]}, True),
        ({"stages": ["warm_start 30%", "gumbel"], "lm_weight": "0"}, False),
        ({"stages": ["warm_start 30%", "gumbel"], "lm_reference": "subject"}, False),
    ],
)
def test_the_decoder_of_a_warm_start_is_kept_where_any_stage_holds_text_close_to_it(tmp_path, settings, keeps):
    assert arguments(tmp_path, **settings).keeps_warm_start() is keeps


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("fve", True), ("kl", False), ("eval_kl", False), ("kl_recovered", True), ("loss", False)]
    + [("text_perplexity", False), ("perplexity_ratio", False), ("top1_agreement", True), ("cosine", True)],
)
def test_whether_a_metric_should_grow_is_known(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


@pytest.mark.parametrize("settings", [{"save_steps": 0.2, "eval_steps": 0.1}, {"save_strategy": "best"}])
def test_checkpoints_with_evaluations_may_be_ranked(tmp_path, settings):
    assert arguments(tmp_path, **MEASURED | {"keep_best": 1} | settings).keep_best == 1


def test_the_temperature_may_warm_up_from_above_zero(tmp_path):
    assert arguments(tmp_path, tau="constant 1 warmup 10s from 2").tau == ["constant 1 warmup 10s from 2"]
    with pytest.raises(ValueError, match="tau must stay positive, in a warmup too"):
        arguments(tmp_path, tau="constant 1 warmup 10s")


@pytest.mark.parametrize("which", ["true", "auto"])
def test_a_run_without_a_folder_has_no_newest_checkpoint(which):
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .* pass that of the run as output_dir"):
        ConsistencyLensTrainingArguments(use_cpu=True, resume_from_checkpoint=which)
    named = ConsistencyLensTrainingArguments(use_cpu=True, resume_from_checkpoint="outputs/run/checkpoint-1")
    assert named.resume_from_checkpoint == "outputs/run/checkpoint-1"


def test_clones_are_trained_in_one_of_three_ways():
    with pytest.raises(ValueError, match="^clones must be one of full, lora, frozen, got 'loora'$"):
        RecipeArguments(model="gpt2", clones="loora")
