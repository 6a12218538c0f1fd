import pytest

from consistency_lens.cli.parser import parse_arguments
from consistency_lens.tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments


def fit_arguments(**changes):
    return FitArguments(**{"model": "gpt2", **changes})


def training_arguments(**changes):
    return TunedLensTrainingArguments(**{"use_cpu": True, **changes})


def test_the_defaults_are_the_plan():
    fit, training = fit_arguments(), training_arguments()
    assert (fit.tokens, fit.seq_len, fit.rank, fit.preconditioner) == (16_000_000, 512, "auto", "none")
    assert fit.ridge_tokens == 1_000_000 and fit_arguments(tokens=64_000).ridge_tokens == 8_000
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 1)
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (1e-3, 0.9, 0.999)
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 0.1)
    assert (training.smallness, training.smoothness, training.weight_decay) == (1e-4, 1e-4, 0.0)
    assert (training.position_range, training.seed) == ([0.6, 0.95], 316)
    assert (training.eval_steps, training.save_steps, training.early_stopping_patience) == (100, 100, 3)
    assert training.load_best_model_at_end and training.output_dir == "" and not training.dataloader_pin_memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model: got none; pass it, e.g. --model gpt2"),
        ({"rank": "0"}, "rank must be a whole number above 0, full or auto, got '0'"),
        ({"rank": "half"}, "rank must be a whole number above 0, full or auto, got 'half'"),
        ({"ridge_tokens": -1}, "ridge_tokens must lie in 0..16000000 .tokens., got -1; "),
        ({"ridge_tokens": 16_000_001}, "ridge_tokens must lie in 0..16000000 .tokens., got 16000001"),
        ({"ridge": -0.1}, "ridge must be above 0, got -0.1; 0.01 is a good start"),
        ({"ridge": 0.0}, "ridge must be above 0, got 0.0; 0.01 is a good start"),
        (
            {"ridge_tokens": 0, "preconditioner": "prism"},
            "preconditioner: 'prism' is fitted with the closed form, but ridge_tokens is 0; leave one of them out",
        ),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"preconditioner": "zca"}, "preconditioner must be one of none, whitening, prism, got 'zca'"),
    ],
)
def test_mistakes_of_a_fit_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit_arguments(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_step": "0"}, "layers_per_step must be a whole number above 0, all or auto, got '0'"),
        ({"positions_per_sequence": "some"}, "positions_per_sequence must be a whole number above 0, all or auto"),
        ({"position_range": [0.95, 0.6]}, r"position_range must be two shares .* got \[0.95, 0.6\]; 0.6 0.95"),
        ({"position_range": [0.6]}, r"position_range must be two shares .* got \[0.6\]"),
        ({"position_range": [0.6, 1.1]}, "position_range must be two shares"),
        ({"smallness": -1.0}, "smallness must be 0 or more, got -1.0"),
        ({"smoothness": float("nan")}, "smoothness must be 0 or more, got nan"),
        ({"rows_per_step": 0}, "rows_per_step must be 1 or more, got 0; 128 is usual"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be 1 or more, got 0; 8 is usual"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be 0 or more, got -1; 3 is usual"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0; 0.001 is usual"),
        ({"learning_rate": float("inf")}, "learning_rate must be 0 or more, got inf; 0.001 is usual"),
        ({"seed": -1}, "seed must be 0 or more, got -1; 316 is usual"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs must be 0 or more, got nan; 1 is usual"),
        ({"teacher_top_k": 1}, "teacher_top_k must be at least 2, got 1; 4096 is a good start"),
        ({"translator_optim": "sgd"}, "translator_optim must be one of adamw, muon, got 'sgd'"),
        ({"head_dtype": "float16"}, "head_dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ({"bf16": True}, "bf16: got True, but translators are fitted in float32; leave it out"),
        ({"fp16": True}, "fp16: got True, but translators are fitted in float32"),
        ({"optim": "adafactor"}, "optim: got 'adafactor', but a fit has translator_optim"),
        ({"adam_epsilon": 1e-6}, "adam_epsilon: got 1e-06, but it stays 1e-8"),
        ({"fsdp": "full_shard"}, "fsdp: got 'full_shard', but a tuned lens is small"),
        ({"deepspeed": "zero.json"}, "deepspeed: got 'zero.json', but a tuned lens is small"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint: got 'true', but a fit goes on by itself"),
        ({"save_only_model": True}, "save_only_model: got True, but a fit goes on by itself"),
        ({"push_to_hub": True}, "push_to_hub: got True, but publish the lens when"),
        ({"save_steps": 200}, "save_steps: got 200 and eval_steps 100; set them alike"),
        ({"load_best_model_at_end": False}, "early_stopping_patience: needs load_best_model_at_end"),
    ],
)
def test_mistakes_of_the_steps_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        training_arguments(**changes)
    assert "\n" not in str(caught.value)


def test_counts():
    args = training_arguments(layers_per_step="all", positions_per_sequence="7")
    assert args.count_of("layers_per_step", 24, 31) == 31
    assert [args.count_of("positions_per_sequence", 16, n) for n in (100, 5)] == [7, 5]
    args = training_arguments()
    assert [args.count_of("layers_per_step", 24, n) for n in (31, 5)] == [24, 5]


def test_flags_and_a_file_are_read(tmp_path):
    (tmp_path / "fit.yaml").write_text("model: gpt2\nrank: 8\nposition_range: [0.0, 1.0]\nlayers_per_step: 2\n")
    flags = ["--config", str(tmp_path / "fit.yaml"), "--learning_rate", "1e-2", "--use_cpu", "true"]
    fit, training = parse_arguments((FitArguments, TunedLensTrainingArguments), flags)
    assert (fit.rank, training.layers_per_step, training.learning_rate) == ("8", "2", 1e-2)
    assert training.position_range == [0.0, 1.0]
    assert fit_arguments(rank=8).rank == "8"


def test_the_settings_are_json_without_the_folder():
    settings = training_arguments(output_dir="somewhere").to_json_settings()
    assert "output_dir" not in settings and settings["smallness"] == 1e-4
