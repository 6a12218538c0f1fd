"""The decoder's pass over a given text: a long prompt runs once for all rows."""

import pytest
import torch
from flop_count import flops
from tiny_lenses import activations, disturb, tiny_lens
from tiny_models import FAMILIES, random_tokens

ROWS, LONG = 3, "w3 w4 w5 w6 <embed> w7"


def texts(rows=ROWS):
    return random_tokens(*[5] * rows)[0]


@pytest.mark.parametrize("arguments", [{}, {"injection_layers": 2}, {"trainable_prompt": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_that_runs_once_gives_the_same(family, arguments):
    # a window shorter than the prompt, where the family has one
    model = {"sliding_window": 3} if family.startswith("gemma") else {}
    decoder = disturb(tiny_lens(family, "full", model, decoder_prompt=LONG, **arguments)).decoder
    found = []
    for use_cache in (True, False):
        logits = decoder(activations(ROWS), texts(), use_cache=use_cache)
        parts = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(logits.square().mean(), list(parts.values()), allow_unused=True)
        found.append((logits, dict(zip(parts, grads, strict=True))))
    assert found[0][1].keys() == found[1][1].keys()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_long_prompt_is_run_once_a_batch_and_a_short_one_in_each_row():
    for prompt, share in ((LONG, 0.62), ("w3 <embed>", 1.0)):
        decoder = tiny_lens("llama", decoder_prompt=prompt).decoder

        def run(use_cache, decoder=decoder):
            with torch.no_grad():
                decoder(activations(32), texts(32), use_cache=use_cache)

        once, each = (flops(lambda cached=c, run=run: run(cached)) for c in (True, False))
        assert once <= share * each  # 6 tokens of 11 a row, and the head


def test_checkpointing_runs_the_prompt_in_each_row():
    lens = tiny_lens("llama", "full", decoder_prompt=LONG)
    expected = lens.decoder(activations(ROWS), texts())
    lens.decoder.base.gradient_checkpointing_enable()
    lens.train()
    logits = lens.decoder(activations(ROWS), texts())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert lens.decoder.base.get_decoder().layers[0].mlp.up_proj.weight.grad is not None
