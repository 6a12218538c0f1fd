"""Settings that cannot go together: each is one line that says what, what was given, and how to mend it."""

import pytest
from lens_runs import tiny_cache, tiny_lens, training_rows
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from torch.utils.data import IterableDataset

from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.subject_loading import load_subject_and_tokenizer
from consistency_lens.training import recipe
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.combinations import check_recipe, check_rows
from consistency_lens.training.recipe_arguments import RecipeArguments
from consistency_lens.training.trainer import ConsistencyLensTrainer

OTHERS = {"stages": ["gumbel"], "delta_residual": "detached", "lm_weight": "0"}


def training_arguments(tmp_path, **settings):
    defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 10, "report_to": "none"}
    return ConsistencyLensTrainingArguments(**(defaults | settings))


def one_line(failed) -> bool:
    return "\n" not in str(failed.value)


@pytest.fixture
def launched(monkeypatch):
    """Launches as with a strategy that spreads weights."""

    def launch(strategy):
        monkeypatch.setattr("consistency_lens.training.combinations.spread_by", lambda args: strategy)

    return launch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recipe_settings", "settings", "strategy", "message"),
    [
        (
            {"quantization": "4bit", "clones": "full"}, {}, None,
            "clones: got full, but the 4bit weights of quantization cannot be trained; set clones to lora or frozen",
        ),
        (
            {"quantization": "8bit", "clones": "lora"}, {}, "FSDP",
            "quantization: got 8bit, but FSDP cannot spread quantised weights; train with DDP or ZeRO-2",
        ),
        (
            {"quantization": "4bit", "clones": "lora"}, {}, "ZeRO-3",
            "quantization: got 4bit, but ZeRO-3 cannot spread quantised weights; train with DDP or ZeRO-2",
        ),
        ({"quantization": "3bit", "clones": "lora"}, {}, None, "quantization must be one of 8bit, 4bit, got '3bit'"),
        ({"dtype": "float8"}, {}, None, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (
            {"attention": "flash_attention_2", "dtype": "bfloat16"}, {}, None,
            "attention: flash_attention_2 takes bfloat16 or float16 on a GPU, got bfloat16 on a CPU; set attention",
        ),
        ({"attention": "flex_attention"}, {}, None, "attention: flex_attention has no gradient on a CPU; set"),
        (
            {"activations": "someone/activations"}, {"dataloader_num_workers": 2}, None,
            "dataloader_num_workers: got 2, but a stream loads ahead by itself, and each worker would download it",
        ),
        (
            {"activations": "someone/activations"}, {"length_window": 2}, None,
            "length_window: got 2, but only rows of a cache, or read on the fly, are known before they are read; set",
        ),
        (
            {"summaries": "no.jsonl"}, {"positions_together": 3}, None,
            "positions_together: got 3, but only rows of a cache, .*; set it to 1 for streamed rows, summaries and",
        ),
        ({}, {**OTHERS, "per_device_train_batch_size": 3}, None, "per_device_train_batch_size: got 3, but .*; make"),
        ({}, {**OTHERS, "auto_find_batch_size": True}, None, "auto_find_batch_size: may come to batches that divide"),
        (
            {}, {**OTHERS, "accelerator_config": {"split_batches": True}}, None,
            "accelerator_config: split_batches may divide pairs of rows; leave it out, or set pair_in_batch to false",
        ),
        (
            {}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}, None,
            "gradient_checkpointing_kwargs: use_reentrant=True loses gradients of adapters behind frozen weights;",
        ),
        (
            {}, {"torch_compile": True}, "FSDP",
            "torch_compile: compiles weights that lie whole in each process, got FSDP; set it to false, or train with",
        ),
        ({}, {"torch_compile": True}, "ZeRO-3", "torch_compile: compiles weights .*, got ZeRO-3; set it to false"),
        ({}, {"bf16_full_eval": True}, None, "bf16_full_eval: would round the trained tensors.*; set bf16 instead"),
        ({}, {"ema_decay": 0.9}, "FSDP", "ema_decay: cannot average tensors that FSDP spreads over processes; set it"),
        ({}, {"ema_decay": 0.9, "save_only_model": True}, None, "save_only_model: its checkpoints leave out the aver"),
        ({}, {"fp16_full_eval": True}, None, "fp16_full_eval: would round the trained tensors.*; set fp16 instead"),
        (
            {}, {"metric_for_best_model": "fev"}, None,
            "metric_for_best_model: no evaluation gives 'fev'; it is one of loss, fve, .*, shuffled_fve, shuf",
        ),
    ],
)  # fmt: skip
def test_combinations_that_a_recipe_cannot_have(
    tmp_path, recipe_settings, settings, strategy, message, launched, monkeypatch
):
    def load(*_arguments, **_settings):
        raise AssertionError("the subject was loaded")

    args, training_args = RecipeArguments(model="no/such", **recipe_settings), training_arguments(tmp_path, **settings)
    check_recipe(RecipeArguments(model="no/such"), training_arguments(tmp_path))  # which by themselves may go together
    launched(strategy)
    monkeypatch.setattr(recipe, "load_subject_and_tokenizer", load)
    with pytest.raises(ValueError, match=message) as failed:
        recipe.run(args, training_args)
    assert one_line(failed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"output_dir": None, "resume_from_checkpoint": "auto"}, "resume_from_checkpoint: got auto, but without out"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "fve", "eval_strategy": "steps",
             "eval_steps": 5, "save_strategy": "epoch"},
            "requires the save and eval strategy to match",
        ),
        ({"stages": ["warm_start 2s", "gumbel"], "load_best_model_at_end": True, "eval_strategy": "steps",
          "eval_steps": 5, "save_steps": 5}, "load_best_model_at_end: "),
    ],
)  # fmt: skip
def test_combinations_that_training_arguments_refuse_by_themselves(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **settings)


class Endless(IterableDataset):
    """Rows that nobody has counted."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        while True:
            yield from (self.rows[index] for index in range(len(self.rows)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps: got -1, but the training rows have no known number; set it to the steps"),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps: got 4, but the training rows have no known number, so that .*; set it to 1",
        ),
        ({"save_strategy": "epoch"}, "save_strategy: got epoch, but the training rows have no known number; set"),
        ({"logging_strategy": "epoch"}, "logging_strategy: got epoch, but the training rows"),
        ({"stages": ["warm_start 1e", "gumbel"]}, "stages: duration '1e' counts epochs, but the data has no known"),
        ({"kl_weight": "linear 0 -> 1 over 2e"}, "kl_weight: duration '2e' counts epochs, but the data has no known"),
        ({"unfreeze": ["encoder_base 1e"]}, "unfreeze: duration '1e' counts epochs, but the data has no known"),
        (
            {"unfreeze": ["encoder_base 1s warmup 0.5e"]},
            "unfreeze: duration '0.5e' counts epochs, but the data has no known length; write steps",
        ),
    ],
)  # fmt: skip
def test_rows_that_nobody_has_counted(tmp_path, settings, message):
    args = training_arguments(tmp_path, **({"save_strategy": "no"} | settings))
    check_rows([1, 2, 3], args)  # with a known number it may be
    with pytest.raises(ValueError, match=message) as failed:
        check_rows(Endless([1]), args)
    assert one_line(failed)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("train_dataset", {"pair_in_batch": False}), ("eval_dataset", {"eval_strategy": "steps", "eval_steps": 1})],
)
@pytest.mark.parametrize("source", ["cache", "on_the_fly", "stream"])
def test_rows_without_a_second_activation_are_told_at_once(tmp_path, name, settings, source):
    subject, tokenizer, cache = tiny_cache(tmp_path / "cache")
    rows = {seed: training_rows(source, subject, cache, seed) for seed in (None, 0)}
    arguments = {
        "model": tiny_lens(subject, tokenizer, cache), "data_collator": ActivationCollator(0, 3, bos_token_id=1),
        "args": training_arguments(tmp_path, **(OTHERS | settings)),
    }  # fmt: skip
    given = {"train_dataset": rows[0], "eval_dataset": rows[0]}
    ConsistencyLensTrainer(**arguments, **given)
    message = f"{name}: delta_residual=detached takes a second activation A', but these rows have none; make them"
    with pytest.raises(ValueError, match=message) as failed:
        ConsistencyLensTrainer(**arguments, **(given | {name: rows[None]}))
    assert one_line(failed)


def test_uncounted_rows_train_by_steps(tmp_path):
    subject, tokenizer, cache = tiny_cache(tmp_path / "cache")
    rows = Endless(training_rows("cache", subject, cache, None))
    arguments = {
        "args": training_arguments(tmp_path, stages=["warm_start 1s", "gumbel"], max_steps=3, save_strategy="no"),
        "model": tiny_lens(subject, tokenizer, cache), "train_dataset": rows,
        "data_collator": ActivationCollator(0, 3, bos_token_id=1),
    }  # fmt: skip
    trainer = ConsistencyLensTrainer(**arguments)
    trainer.train()
    assert trainer.state.global_step == 3
    arguments["args"] = training_arguments(tmp_path, stages=["warm_start 1e", "gumbel"])
    with pytest.raises(ValueError, match="stages: duration '1e' counts epochs"):
        ConsistencyLensTrainer(**arguments)


def test_a_trainer_knows_a_quantised_lens(tmp_path, launched):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    model = load_subject_and_tokenizer(str(tmp_path / "subject"), quantization="8bit", device="cpu").model
    subject, tokenizer, cache = tiny_cache(tmp_path / "cache", model=model)
    lens = tiny_lens(subject, tokenizer, cache, training="frozen")
    args = training_arguments(tmp_path)
    launched("ZeRO-3")
    with pytest.raises(
        ValueError, match="the subject is quantised, but ZeRO-3 cannot spread quantised weights; train"
    ):
        ConsistencyLensTrainer(model=lens, args=args)


def test_an_architecture_that_cannot_recompute_is_named(tmp_path):
    subject, tokenizer, cache = tiny_cache(tmp_path / "cache")
    lens = tiny_lens(subject, tokenizer, cache)
    lens.decoder.base.supports_gradient_checkpointing = False
    args = training_arguments(tmp_path, activation_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing: LlamaForCausalLM cannot recompute its blocks; set"):
        ConsistencyLensTrainer(model=lens, args=args)
