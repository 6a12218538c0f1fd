"""Compiled clones: the same texts, gradients, names and losses; few graphs, however long a text is."""

import pytest
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from lens_runs import tiny_trainer
from tiny_lenses import INJECTED, activations, disturb, gradients, keys, tiny_lens
from tiny_models import WIDTH, tiny_model

from consistency_lens.training.compilation import compile_clones
from consistency_lens.training.lm_reference import freeze_copy

ONE_BLOCK = {"num_hidden_layers": 1}


@pytest.fixture
def compiled_graphs():
    """Counts the graphs that were compiled since the test began."""
    limit = torch._dynamo.config.recompile_limit
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()


def one_pass(lens, batch=3, length=4):
    output = lens(activations(batch), noise_keys=keys(batch), num_text_tokens=length)
    return output.text_ids, gradients(output.reconstruction.square().mean() + output.logits.square().mean(), lens)


@pytest.mark.slow
def test_texts_and_gradients_are_those_without_in_few_graphs(compiled_graphs):
    plain = disturb(tiny_lens("llama", "full", ONE_BLOCK, layer=0)).train()
    lens = disturb(tiny_lens("llama", "full", ONE_BLOCK, layer=0)).train()
    compile_clones(lens, TorchDynamoPlugin(backend="eager"))
    for settings in ({}, {"batch": 4}, {"length": 7}):
        (ids, found), (expected_ids, expected) = one_pass(lens, **settings), one_pass(plain, **settings)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # the slot, a token behind it, and the encoder's text; a longer text or another batch takes no other
    assert 3 <= compiled_graphs() <= 4
    assert lens.state_dict().keys() == plain.state_dict().keys()
    reference = freeze_copy(lens.decoder)
    with torch.no_grad():
        assert torch.equal(reference(activations(), ids[:3]), plain.decoder(activations(), ids[:3]))


def test_passes_with_injections_are_not_compiled(compiled_graphs):
    settings = {**INJECTED, "injection_layers": 1, "layer": 0}
    plain, lens = (disturb(tiny_lens("llama", "frozen", {"num_hidden_layers": 2}, **settings)) for _ in range(2))
    compile_clones(lens, TorchDynamoPlugin(backend="eager"))
    with torch.no_grad():
        # compiled without hooks, for inputs like those that will come with them
        lens.decoder.base(inputs_embeds=torch.randn(3, 7, WIDTH), use_cache=False, logits_to_keep=2)
        text_ids = torch.tensor([[5, 6], [9, 4], [7, 7]])
        assert torch.equal(lens.decoder(activations(), text_ids), plain.decoder(activations(), text_ids))
    assert compiled_graphs() == 1


def test_the_trainer_compiles_the_bases_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    compiled = [name for name, module in trainer.lens.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["decoder.base", "encoder.base"]
    apart = tiny_trainer(tmp_path / "apart", torch_compile=True, torch_compile_backend="eager", logits_chunk_size=4)
    compiled = [name for name, module in apart.lens.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["decoder.base.model", "encoder.base"]
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    plain = tiny_trainer(tmp_path)
    assert all(module._compiled_call_impl is None for module in plain.lens.modules())


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
def test_weights_that_are_not_shared_are_compiled_too(tmp_path, training):
    """And the decoder as warm start left it, to which text is held close, is as little compiled as any copy."""
    pytest.importorskip("peft")
    trainer = tiny_trainer(
        tmp_path, {"training": training}, torch_compile=True, torch_compile_backend="eager", share_weights="false",
        lm_weight="0.1", lm_reference="warm_start",
    )  # fmt: skip
    compiled = [name for name, module in trainer.lens.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["decoder.base", "encoder.base"]
    reference = trainer.lm_reference().decoder
    assert all(module._compiled_call_impl is None for module in reference.modules())


@pytest.mark.slow
def test_losses_are_those_without(tmp_path, compiled_graphs):
    stages = ["warm_start 2s", "gumbel 3s", "policy_gradient"]
    settings = {"max_steps": 8, "stages": stages, "own_share": 0.5, "activation_checkpointing": True}
    losses = []
    compiled_ways = ({}, {"torch_compile": True}, {"torch_compile": True, "logits_chunk_size": 5})
    for name, compiled in zip(("plain", "compiled", "chunks"), compiled_ways, strict=True):
        model = tiny_model("llama", num_hidden_layers=2)
        trainer = tiny_trainer(tmp_path / name, model=model, **settings, **compiled)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert compiled_graphs() > 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)
