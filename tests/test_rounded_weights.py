"""Frozen weights under autocast: rounded once a step, with the same numbers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from live_bytes import peak_bytes
from operations import Operations
from tiny_lenses import activations, disturb, keys, tiny_lens
from torch import Tensor

from consistency_lens import ConsistencyLensModel
from consistency_lens.plain_arithmetic import plain_arithmetic
from consistency_lens.rounded_weights import FrozenLayer, weights_rounded_once

AUTOCAST = ("cpu", torch.bfloat16)


def training_lens(family: str = "llama", training: str = "frozen") -> ConsistencyLensModel:
    return disturb(tiny_lens(family, training)).train()


def step(
    lens: ConsistencyLensModel, around: Callable[[], AbstractContextManager], chunk_size: int = 0
) -> list[Tensor]:
    """The text, its logits and the reconstruction, and the gradients of all that is trained."""
    lens.zero_grad()
    with torch.autocast(*AUTOCAST), around():
        text = lens.decoder.generate_soft(activations(3), keys(3), 4, chunk_size=chunk_size)
        reconstruction = lens.encoder(lens.encoder.embed_text(text, keys(3), 1.0))
        (reconstruction.square().mean() + text.logits.float().square().mean()).backward()
    return [text.token_ids, text.logits, reconstruction, *(p.grad for p in lens.parameters() if p.grad is not None)]


def rounded(lens: ConsistencyLensModel) -> set[str]:
    """Names of the layers whose weights are rounded once."""
    with weights_rounded_once(lens):
        return {name for name, module in lens.named_modules() if isinstance(vars(module).get("forward"), FrozenLayer)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("chunk_size", [0, 2])  # in chunks, the head runs again in the backward pass
def test_the_numbers_are_the_same_to_the_bit(family, chunk_size):
    lens = training_lens(family)
    expected = step(lens, nullcontext, chunk_size)
    found = step(lens, lambda: weights_rounded_once(lens), chunk_size)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_a_weight_is_rounded_once_for_all_passes_and_clones(training):
    lens = training_lens(training=training)
    model = lens.subject.model
    with Operations() as operations, torch.autocast(*AUTOCAST), weights_rounded_once(lens):
        lens(activations=activations(3), noise_keys=keys(3), tau=1.0)
    # no adapter is added to these, and nothing that is trained is of such a shape
    assert operations.shapes.count(model.lm_head.weight.shape) == 1
    assert operations.shapes.count(model.model.layers[0].mlp.down_proj.weight.shape) == len(model.model.layers)


def test_longer_texts_keep_no_more_copies_of_the_weights():
    lens = training_lens()
    weights = 2 * sum(p.numel() for name, p in lens.decoder.base.named_parameters() if p.ndim == 2)

    def grown(around: Callable[[], AbstractContextManager]) -> int:
        """Bytes that two more tokens take."""

        def peak(count: int) -> int:
            def work() -> None:
                with torch.autocast(*AUTOCAST), around():
                    lens.decoder.generate_soft(activations(1), keys(1), count).logits.float().sum().backward()

            return peak_bytes(work, lens)

        return peak(6) - peak(4)

    assert grown(nullcontext) > 1.5 * weights
    assert grown(lambda: weights_rounded_once(lens)) < 0.5 * weights


def test_only_frozen_float32_layers_under_autocast_are_changed():
    lens = training_lens()
    linear = {name for name, module in lens.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.autocast(*AUTOCAST):
        names = rounded(lens)
        assert names and all(".base." in name for name in names)
        assert linear - names == {"decoder.projection", "encoder.output_map"}
        with plain_arithmetic():
            assert rounded(lens) == set()
        assert rounded(training_lens(training="full")) == set()
        seen = lens.get_submodule(min(names))
        hook = seen.register_forward_pre_hook(lambda *_: None)
        assert rounded(lens) == names - {min(names)}
        hook.remove()
        lens.gradient_checkpointing_enable()
        assert rounded(lens) == set() != rounded(lens.eval())
        lens.bfloat16()
        assert rounded(lens) == set()
    assert rounded(training_lens()) == set()


def test_layers_are_as_they_were_afterwards():
    lens = training_lens()
    with pytest.raises(RuntimeError), torch.autocast(*AUTOCAST), weights_rounded_once(lens):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in lens.modules())
