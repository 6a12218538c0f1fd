"""What saves memory in training, and must not change what is trained: checkpointing, bfloat16, quantised subjects."""

import pytest
import torch
from lens_runs import tiny_trainer
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import TrainerCallback

from consistency_lens.data.subject_loading import load_subject_and_tokenizer

LORA = {"training": "lora", "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
CLONES = {"full": {"training": "full"}, "lora": LORA}
OBJECTIVES = ("warm_start", "gumbel", "policy_gradient")
ALL_STAGES = ["warm_start 2s", "gumbel 2s", "policy_gradient"]


class KeepGradients(TrainerCallback):
    """The gradient of every trained tensor at every step, None where there is none."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append({name: None if grad is None else grad.clone() for name, grad in gradients.items()})


def trained(folder, clones, **arguments):
    """A trainer that has trained, and the gradients of its steps."""
    if clones == "lora":
        pytest.importorskip("peft")
    keep = KeepGradients()
    trainer = tiny_trainer(folder, CLONES[clones], lm_reference="subject", **arguments)
    trainer.add_callback(keep)
    trainer.train()
    return trainer, keep.steps


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("clones", CLONES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointing_changes_no_gradient(tmp_path, objective, clones):
    # what transformers calls it now, and what it was called before
    name = "gradient_checkpointing" if clones == "full" else "activation_checkpointing"
    settings = {"max_steps": 2, "stages": [objective], "own_share": 0.5, "optim": "sgd"}
    _, plain = trained(tmp_path / "plain", clones, **settings)
    trainer, checkpointed = trained(tmp_path / "checkpointed", clones, **settings, **{name: True})
    assert trainer.lens.train().decoder.checkpoints_gradients()  # it was on
    assert len(plain) == len(checkpointed) == 2
    for expected, found in zip(plain, checkpointed, strict=True):
        assert all(gradient is not None for gradient in found.values())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clones", CLONES)
def test_bf16_has_masters_and_moments_in_float32_and_losses_near_those_of_float32(tmp_path, clones):
    # another rounding draws another word now and then, so there are many of them
    settings = {"max_steps": 6, "stages": ALL_STAGES, "per_device_train_batch_size": 96}
    exact, _ = trained(tmp_path / "exact", clones, **settings)
    half, gradients = trained(tmp_path / "half", clones, bf16=True, model=tiny_model("llama").bfloat16(), **settings)
    assert half.lens.subject.model.dtype == torch.bfloat16
    assert {p.dtype for p in half.lens.parameters() if p.requires_grad} == {torch.float32}
    moments = [moment for state in half.optimizer.state.values() for moment in state.values() if moment.ndim > 0]
    assert moments and {moment.dtype for moment in moments} == {torch.float32}
    assert all(grad is not None and grad.isfinite().all() for step in gradients for grad in step.values())
    assert losses(half) == pytest.approx(losses(exact), rel=0.05)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_all_stages_train_adapters_over_a_quantised_subject(tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    model = load_subject_and_tokenizer(str(tmp_path / "subject"), quantization=quantization, device="cpu").model
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    trainer, steps = trained(
        tmp_path, "lora", model=model, max_steps=6, stages=ALL_STAGES, own_share=0.5, activation_checkpointing=True,
        learning_rate=1e-2,
    )  # fmt: skip
    assert len(steps) == 6
    for step in steps:
        adapters = [gradient for name, gradient in step.items() if ".lora_" in name]
        assert adapters and all(gradient is not None and gradient.isfinite().all() for gradient in step.values())
    # at the first step the second matrices of the adapters are zero, and so are the gradients of the first
    assert all(gradient.abs().sum() > 0 for gradient in steps[-1].values())
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.lens.subject.model.named_parameters())
    assert trainer.state.log_history[2]["kl"] > 0
