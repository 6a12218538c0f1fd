"""A dry run against the run that it plans: the same counts, bytes, steps, files and mistakes, and nothing done."""

import json
from pathlib import Path

import pytest
import torch
from lens_runs import LAYER, NUM_TEXT_TOKENS, tiny_trainer
from tiny_lenses import LORA_TARGETS, PROMPTS, tiny_tokenizer
from tiny_models import tiny_model
from transformers import TrainerCallback

from consistency_lens import ConsistencyLensModel
from consistency_lens.cli.parser import parse_arguments
from consistency_lens.cli.train import main
from consistency_lens.data.subject_loading import load_subject_and_tokenizer
from consistency_lens.losses import entropy, token_cross_entropy
from consistency_lens.quantised import state_beside_weights
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.dry_run import dry_run, load_empty_subject
from consistency_lens.training.memory_estimate import (
    activation_bytes,
    all_tensors,
    memory_estimates,
    num_bytes,
    quantised_bytes,
)
from consistency_lens.training.recipe_arguments import RecipeArguments

TEXT = "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))
LORA = {"r": 2, "lora_alpha": 4, "target_modules": LORA_TARGETS["llama"]}


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    """A subject whose weights are nowhere."""
    folder = tmp_path_factory.mktemp("subject")
    tiny_model("llama").config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def flags(subject_folder, output_dir, **changes):
    settings = {
        "model": subject_folder, "layer": 1, "num_text_tokens": 3, "min_position": 4, "max_length": 16,
        "dataset": Path(subject_folder) / "text.txt", "positions_per_sequence": 3, "validation_fraction": 0.3,
        "eval_rows": 16, "num_samples": 2, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True,
        "output_dir": output_dir, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    } | changes  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def plan(subject_folder, output_dir, **changes):
    arguments = flags(subject_folder, output_dir, **changes)
    return dry_run(*parse_arguments((RecipeArguments, ConsistencyLensTrainingArguments), arguments))


def files_below(folder):
    return sorted(path for path in Path(folder).rglob("*"))


class BytesOfGradients(TrainerCallback):
    """What the gradients took at the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("lens_settings", "arguments"),
    [
        ({"training": "full"}, {}),
        ({"training": "lora", "lora": LORA, **PROMPTS}, {"optim": "adamw_torch"}),
        ({"training": "frozen", "injection_layers": 1}, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    ],
    ids=["full", "lora", "frozen"],
)
def test_weights_gradients_and_states_are_those_of_the_trainer(tmp_path, lens_settings, arguments):
    trainer = tiny_trainer(tmp_path, lens_settings, max_steps=1, stages=["warm_start"], **arguments)
    gradients = BytesOfGradients()
    trainer.add_callback(gradients)
    trainer.train()
    subject, lens = trainer.lens.subject.model, trainer.lens
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]

    subject.config.save_pretrained(tmp_path / "subject")
    lens.require_tokenizer().save_pretrained(tmp_path / "subject")
    empty = load_empty_subject(str(tmp_path / "subject"), None, "float32")
    settings = {"num_text_tokens": NUM_TEXT_TOKENS, **lens_settings}
    same = ConsistencyLensModel.from_subject(empty.model, empty.tokenizer, LAYER, **settings)
    assert {parameter.device.type for parameter in same.parameters()} == {"meta"}
    (memory,) = memory_estimates(same, trainer.args, processes=1, max_length=16)
    assert memory.weights == num_bytes([*all_tensors(subject), *all_tensors(lens)])
    assert memory.gradients == gradients.found
    assert memory.optimizer == num_bytes(value for value in states if isinstance(value, torch.Tensor))


def test_the_reference_that_warm_start_leaves_is_counted(subject_folder, tmp_path):
    with_it, without = (plan(subject_folder, tmp_path, lm_weight=weight) for weight in (0.1, 0))
    decoder = next(part for part in with_it.parameters if part.part == "decoder")
    assert with_it.memory[0].weights - without.memory[0].weights == 4 * decoder.trained


@pytest.mark.parametrize("stage", ["warm_start", "gumbel", "policy_gradient"])
def test_logits_in_chunks_count_as_far_as_they_are_held(subject_folder, tmp_path, stage):
    def activations_of(size):
        changes = {"stages": stage, "lm_reference": "subject", "logits_chunk_size": size}
        return plan(subject_folder, tmp_path, **changes).memory[0].activations

    assert activations_of(1) < activations_of(2) < activations_of(0) == activations_of(10**6)


def test_a_second_activation_takes_room_where_it_is_no_row_of_the_batch(tmp_path):
    lens = ConsistencyLensModel.from_subject(tiny_model("llama"), tiny_tokenizer(), LAYER, num_text_tokens=3)

    def estimated(streamed, **settings):
        args = ConsistencyLensTrainingArguments(
            output_dir=str(tmp_path), stages=["gumbel"], kl_weight="0", lm_weight="0", use_cpu=True, **settings
        )
        return activation_bytes(lens, args, 0, 16, streamed)

    alone, others = estimated(True), {"delta_residual": "full"}
    assert estimated(False, **others) == alone
    assert estimated(True, **others) == estimated(False, pair_in_batch=False, **others) == 2 * alone


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("training", ["full", "lora", "frozen"])
@pytest.mark.parametrize("objective", ["warm_start", "gumbel"])
def test_activations_are_estimated_within_a_factor_of_two(tmp_path, family, training, objective):
    sizes = {"llama": {"hidden_size": 64, "intermediate_size": 192}, "gpt2": {"hidden_size": 64}}[family]
    lora = {"r": 2, "target_modules": LORA_TARGETS[family]} if training == "lora" else None
    subject, batch = tiny_model(family, **sizes), 8
    lens = ConsistencyLensModel.from_subject(
        subject, tiny_tokenizer(), LAYER, num_text_tokens=8, training=training, lora=lora
    ).train()
    kept, own = {}, {tensor.untyped_storage().data_ptr() for tensor in all_tensors(lens)}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    activations = torch.randn(batch, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if objective == "warm_start":
            output = lens(activations=activations, text_ids=torch.ones(batch, 8, dtype=torch.long))
            token_cross_entropy(output.logits, output.text_ids, torch.ones(batch, 8, dtype=torch.bool))
        else:
            entropy(lens(activations=activations, noise_keys=torch.arange(batch)).logits)
    args = ConsistencyLensTrainingArguments(
        output_dir=str(tmp_path), stages=[objective], kl_weight="0", lm_weight="0", lm_reference="subject",
        per_device_train_batch_size=batch, use_cpu=True,
    )  # fmt: skip
    found = sum(size for size, _ in kept.values())
    assert 0.5 < activation_bytes(lens, args, 0, max_length=16) / found < 2


def test_the_plan_is_what_the_run_does(subject_folder, tmp_path):
    folder = tmp_path / "subject"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    changes = {
        "dataset": subject_folder / "text.txt", "max_steps": -1, "num_train_epochs": 1.5, "save_strategy": "steps",
        "save_steps": 7, "gradient_accumulation_steps": 2, "stages": "policy_gradient", "lm_reference": "subject",
        "lr_scheduler_type": "linear", "warmup_steps": 3, "logging_steps": 1,
    }  # fmt: skip
    planned = plan(folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    assert main(flags(folder, tmp_path / "run", **changes)) == 0

    lens = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert planned.rows.exact and planned.rows.train == lens["train_rows"]
    assert planned.rows.held_out >= lens["validation_rows"]
    last = tmp_path / "run" / f"checkpoint-{planned.total_steps}"
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == planned.total_steps == planned.stages[-1].last_step
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    for step, factor in planned.stages[0].schedules["learning rate"]:
        assert rates[step] == pytest.approx(factor * planned.rates[0].learning_rate)

    written = {path for path in (tmp_path / "run").iterdir() if path.name not in ("data", "tokenizer_config.json")}
    cache = tmp_path / "run" / "data" / "activations-layer1"
    assert {file.path for file in planned.files} == written | {cache}
    sizes = {file.path.name: file.size for file in planned.files}
    tensors = (last / "model.safetensors").stat().st_size
    assert sizes["model.safetensors"] == pytest.approx(tensors, rel=0.1)
    states = (last / "optimizer.safetensors").stat().st_size
    assert sizes[last.name] == pytest.approx(tensors + states, rel=0.1)
    shards = sum(path.stat().st_size for path in cache.glob("shard-*.arrow"))
    assert sizes[cache.name] == pytest.approx(shards, rel=0.2)

    again = plan(folder, tmp_path / "run", **changes)
    assert again.rows.is_cached and again.rows.train == planned.rows.train
    assert all(file.exists for file in again.files)


def test_rows_that_find_no_partner_take_no_step(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    # of one to three activations: a part of each size is left over, at most
    documents = [" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(5 + i % 4)) for i in range(30)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    changes = {
        "dataset": tmp_path / "text.txt", "max_steps": -1, "num_train_epochs": 1, "stages": "gumbel", "kl_weight": 0,
        "lm_weight": 0, "mse_weight": 1, "delta_residual": "detached", "per_device_train_batch_size": 2,
        "positions_together": 3,
    }  # fmt: skip
    planned = plan(tmp_path / "subject", tmp_path / "run", **changes)
    assert main(flags(tmp_path / "subject", tmp_path / "run", **changes)) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert planned.total_steps == plan(tmp_path / "subject", tmp_path / "run", **changes).total_steps
    assert planned.total_steps == record["steps"] < planned.rows.train // 2


def test_nothing_is_loaded_or_written(subject_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path), files_below(subject_folder)
    assert main([*flags(subject_folder, tmp_path / "run"), "--dry_run"]) == 0
    assert (files_below(tmp_path), files_below(subject_folder)) == before
    out = capsys.readouterr().out
    assert "nothing is loaded or written" in out
    for words in ("Parameters", "Memory of a process", "warm_start", "decoder_projections", "model.safetensors"):
        assert words in out


def test_several_processes_are_planned_for(subject_folder, tmp_path, monkeypatch):
    alone = plan(subject_folder, tmp_path)
    eight = plan(subject_folder, tmp_path, gradient_accumulation_steps=2, dry_run_processes=8)
    assert (alone.rows_per_step, eight.rows_per_step) == (4, 64)
    assert eight.strategy == "ddp" and [m.strategy for m in eight.memory] == ["ddp", "fsdp2", "zero2", "zero3"]
    one, (ddp, fsdp2, zero2, zero3) = alone.memory[0], eight.memory
    assert ddp.gradients == 2 * one.gradients and ddp.optimizer == one.optimizer and ddp.weights == one.weights
    assert fsdp2.gradients == zero2.gradients == zero3.gradients == one.gradients // 8
    assert zero2.weights == one.weights > zero3.weights == fsdp2.weights == one.weights // 8
    adapters = plan(subject_folder, tmp_path, clones="lora", dry_run_processes=8)
    apart = plan(subject_folder, tmp_path, clones="lora", dry_run_processes=8, share_weights="false")
    assert apart.memory[0].weights > adapters.memory[0].weights
    assert adapters.memory[1].weights == apart.memory[1].weights == apart.memory[0].weights // 8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert plan(subject_folder, tmp_path).strategy == "fsdp2"
    with pytest.raises(ValueError, match="dry_run_processes must be at least 1, got 0"):
        plan(subject_folder, tmp_path, dry_run_processes=0)


def test_clones_with_adapters_share_the_subjects_numbers(subject_folder, tmp_path):
    subject, decoder, encoder, together = plan(subject_folder, tmp_path, clones="lora").parameters
    assert subject.trained == 0 and decoder.shared == subject.total == decoder.frozen
    assert 0 < encoder.shared < subject.total and encoder.trained > 0
    assert together.total == subject.total + decoder.trained + encoder.trained


@pytest.mark.parametrize("stage", ["warm_start", "gumbel", "policy_gradient"])
def test_the_subject_reads_where_it_judges(subject_folder, tmp_path, stage):
    changes = {"stages": stage, "lm_reference": "subject"}
    planned = plan(subject_folder, tmp_path, **changes)
    context = planned.rows.context_tokens
    assert 5 < context < 16
    assert planned.subject_tokens == [4 * context if stage == "gumbel" else 0]
    assert plan(subject_folder, tmp_path, activations="on_the_fly", **changes).subject_tokens == [4 * context]


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": 9},
        {"max_length": 999},
        {"dataset": "nowhere.txt"},
        {"stages": "gumble"},
        {"num_text_tokens": 0},
        {"decoder_prompt": "no slot"},
        {"min_position": 15},
        {"clones": "lora", "lora_targets": "nothing"},
        {"activations": "nowhere", "dataset": ""},
        {"length_penalty": 0.1, "shorter_share": 0.5},
        {"resume_from_checkpoint": "true"},
        {"summaries": "nowhere.jsonl"},
        {"dtype": "float8"},
        {"model": "nowhere"},
        {"injection_layers": 7},
        {"validation_fraction": 1e-9},
        {"quantization": "8bit"},
        {"attention": "swift"},
        {"unfreeze": "decoder_base 9s"},
        {"report_to": "nowhere"},
        {"report_to": "wandb"},
        {"optim": "galore_adamw"},
        {"optim_args": "fast"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_kwargs": '{"steep": 1}'},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_mistakes_are_told_as_the_run_tells_them(subject_folder, tmp_path, capsys, changes):
    folder = tmp_path / "subject"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    arguments = flags(folder, tmp_path / "run", **({"dataset": subject_folder / "text.txt"} | changes))
    assert main([*arguments, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == said.splitlines()[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_take_what_they_will_take(tmp_path, family, quantization):
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_subject_and_tokenizer(str(tmp_path), None, "bfloat16", quantization).model
    scales = [state for state in state_beside_weights(loaded) if state is not None]
    if quantization == "4bit":
        scales = [state.absmax for state in scales]
    else:
        scales = [state for state in scales if state.dtype == torch.float32]
    assert scales
    expected = num_bytes([*loaded.parameters(), *scales])

    empty = load_empty_subject(str(tmp_path), None, "bfloat16").model
    found = num_bytes(empty.parameters(), quantised_bytes(empty, quantization))
    assert found == pytest.approx(expected, rel=0.01)
    assert found < num_bytes(empty.parameters())


def test_groups_that_stand_still_at_first_and_averages_are_told(subject_folder, tmp_path):
    still = plan(subject_folder, tmp_path, unfreeze="decoder_base 2s", ema_decay=0.9)
    starts = {group.name: group.first_step for group in still.rates}
    assert starts["decoder_base"] == 3 and {step for name, step in starts.items() if name != "decoder_base"} == {1}
    plain = plan(subject_folder, tmp_path)
    assert still.memory[0].weights - plain.memory[0].weights == still.memory[0].gradients


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_steps": 2}, ["2", "4", "6", "7"]),
        ({"save_steps": 0}, ["7"]),
        ({"save_steps": 2, "save_total_limit": 2}, ["6", "7"]),
        ({"save_steps": 2, "keep_best": 2}, ["<best 1>", "<best 2>", "7"]),
        ({"save_steps": 2, "keep_best": 4, "save_total_limit": 2}, ["<best 1>", "<best 2>", "6", "7"]),
    ],
)
def test_the_checkpoints_are_those_that_stay(subject_folder, tmp_path, changes, expected):
    settings = {"metric_for_best_model": "fve", "eval_strategy": "steps", "eval_steps": 2, **changes}
    planned = plan(subject_folder, tmp_path / "run", max_steps=7, save_strategy="steps", **settings)
    found = [file.path.name for file in planned.files if "checkpoint-" in file.path.name]
    assert found == [f"checkpoint-{name}" for name in expected]


def test_a_run_of_any_length_is_planned_at_once(subject_folder, tmp_path):
    planned = plan(subject_folder, tmp_path, max_steps=10**12)
    assert planned.total_steps == planned.stages[-1].last_step == 10**12
