"""Attention of a text in place, against keys and values that are appended token by token."""

import gc
import importlib.util
import weakref

import pytest
import torch
from live_bytes import LiveBytes, peak_bytes
from tiny_lenses import INJECTED, PROMPTS, activations, disturb, gradients, keys, tiny_lens, trainable
from tiny_models import FAMILIES, tiny_model
from transformers import DynamicCache

from consistency_lens import text_attention
from consistency_lens.text_attention import NAME, TextPasses, can_attend

# Gemma 2 bounds its scores; the attention of the others is their own code, which transformers does not exchange.
APPENDED = {"gemma2", "falcon", "bloom", "gptj", "gpt_neo"}
IN_PLACE = [family for family in FAMILIES if family not in APPENDED]
NUM_TEXT_TOKENS, TAU = 5, 0.7


def attentions(lens, **settings):
    """Which attention each pass of a text runs."""
    config, seen = lens.decoder.base.config.get_text_config(), []
    last = lens.decoder.residual_stream().blocks[-1]
    hook = last.register_forward_hook(lambda *_: seen.append(config._attn_implementation))
    lens.decoder.generate_soft(activations(), keys(), NUM_TEXT_TOKENS, **settings)
    hook.remove()
    return seen


def text_loss(lens, in_place, given=None, length=NUM_TEXT_TOKENS):
    """A text, and a scalar that hangs on all of its logits and embeddings."""
    lens.decoder.attends_in_place = in_place
    given = activations() if given is None else given
    text = lens.decoder.generate_soft(given, keys(), length, TAU, reader=lens.encoder)
    return text, lens.encoder(text.embeddings).square().mean() + text.logits.float().log_softmax(-1).square().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_in_use_wherever_transformers_exchanges_attention(family):
    lens = tiny_lens(family, "full", **PROMPTS)
    usual = lens.decoder.base.config._attn_implementation
    seen = attentions(lens)
    behind = usual if family in APPENDED else NAME
    assert seen[-NUM_TEXT_TOKENS:] == [usual] + [behind] * (NUM_TEXT_TOKENS - 1)
    assert lens.decoder.base.config._attn_implementation == usual


@pytest.mark.parametrize(
    ("family", "model", "changed", "settings"),
    [
        ("mistral", {"sliding_window": 8}, {}, {}),  # the prompt has 6 tokens
        ("llama", {}, {"attends_in_place": False}, {}),
        ("llama", {}, {}, {"use_cache": False}),
    ],
    ids=["a short window", "turned off", "no cache"],
)
def test_it_is_not_in_use(family, model, changed, settings):
    lens = tiny_lens(family, "full", model, **PROMPTS)
    for name, value in changed.items():
        setattr(lens.decoder, name, value)
    assert NAME not in attentions(lens, **settings)


def test_a_softcap_of_one_model_says_nothing_about_the_next():
    assert can_attend(tiny_model("gemma2", attn_logit_softcapping=None), 10)
    assert not can_attend(tiny_model("gemma2"), 10)


@pytest.mark.parametrize("settings", [{}, INJECTED], ids=["bare", "injected"])
@pytest.mark.parametrize("family", IN_PLACE)
def test_text_and_gradients_are_those_of_appended_keys_and_values(family, settings):
    lens = disturb(tiny_lens(family, "full", **settings))
    results = []
    for in_place in (True, False):
        given = activations().requires_grad_()
        text, loss = text_loss(lens, in_place, given)
        loss.backward()
        results.append((text, {name: p.grad for name, p in trainable(lens).items()} | {"given": given.grad}))
        lens.zero_grad()
    (text, found), (plain, expected) = results
    assert torch.equal(text.token_ids, plain.token_ids)
    torch.testing.assert_close(text.logits, plain.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_gradients_of_adapters_and_of_prompts_alone(training):
    lens = disturb(tiny_lens("llama", training, **PROMPTS))
    found, expected = (gradients(text_loss(lens, in_place)[1], lens) for in_place in (True, False))
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_text_without_gradient_is_the_same_and_changes_no_setting_that_other_threads_see():
    lens = disturb(tiny_lens("llama", "full", **PROMPTS))
    with torch.no_grad():
        assert NAME not in attentions(lens)
    text, _ = text_loss(lens, in_place=True)
    assert torch.equal(lens.decode_ids(activations(), keys=keys(), num_text_tokens=NUM_TEXT_TOKENS), text.token_ids)


def test_in_bfloat16_it_is_as_near_to_float32_as_appending_is():
    lens = disturb(tiny_lens("llama", "full", **PROMPTS))
    exact = text_loss(lens, in_place=False, length=2)[0].logits
    errors = {}
    for in_place in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            text, loss = text_loss(lens, in_place, length=2)
        assert all(gradient.isfinite().all() for gradient in gradients(loss, lens).values())
        errors[in_place] = ((text.logits - exact).norm() / exact.norm()).item()
    assert errors[True] < 1.2 * errors[False] < 0.1


def test_a_second_backward_pass_gives_the_same_gradients():
    lens = disturb(tiny_lens("llama", "full", **PROMPTS))
    _, loss = text_loss(lens, in_place=True)
    parameters = list(lens.decoder.projection.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), first, rtol=0, atol=0)


def test_a_backward_pass_that_broke_off_leaves_nothing_for_the_next():
    lens = disturb(tiny_lens("llama", "full", **PROMPTS))
    expected = gradients(text_loss(lens, in_place=True)[1], lens)
    text, loss = text_loss(lens, in_place=True)
    fails = True

    def break_off(grad):
        if fails:
            raise FloatingPointError("broken")

    lens.decoder.projection.weight.register_hook(break_off)
    with pytest.raises(FloatingPointError):
        loss.backward(retain_graph=True)
    fails = False
    torch.testing.assert_close(gradients(loss, lens), expected, rtol=0, atol=0)


def test_keys_and_values_do_not_grow_with_the_square_of_the_tokens():
    # one head, so that a token's weights, of which each token has more than the one before, are few beside its keys
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 256}
    lens = tiny_lens("llama", "full", one_head, **PROMPTS).train()
    kept = {}
    for in_place in (True, False):
        lens.decoder.attends_in_place = in_place
        for length in (8, 32, 128):
            with LiveBytes(lens) as live:
                text = lens.decoder.generate_soft(activations(), keys(), length)
            kept[in_place, length] = live.now
            del text
    grown = {used: (kept[used, 128] - kept[used, 32]) / (kept[used, 32] - kept[used, 8]) for used in (True, False)}
    assert grown[True] < 4.5 < 10 < grown[False]


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_step_has_a_lower_peak_of_memory(training):
    lens = tiny_lens("llama", training, **PROMPTS, num_text_tokens=16).train()
    text_loss(lens, in_place=True, length=16)[1].backward()  # makes the gradients, which stay
    peaks = {
        in_place: peak_bytes(lambda used=in_place: text_loss(lens, used, length=16)[1].backward(), lens)
        for in_place in (True, False)
    }
    assert peaks[True] < 0.85 * peaks[False]


def test_a_text_goes_with_its_graph():
    model = tiny_model("llama").requires_grad_(True)
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    decoder = model.get_decoder()

    def run(inputs, cache):
        return decoder(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    past = DynamicCache()
    run(embeddings[:, :1], past)
    gc.disable()
    try:
        text = TextPasses(run, model, past, room=2)
        states = [text(token) for token in embeddings[:, 1:].split(1, dim=1)]
        buffer = weakref.ref(text.blocks[0].keys)
        sum(states).sum().backward()
        del text, states
        assert buffer() is None
    finally:
        gc.enable()


def test_another_copy_of_the_code_takes_nothing_away():
    """As loading a published lens with the code beside it makes one."""
    spec = importlib.util.spec_from_file_location(
        "consistency_lens.text_attention_of_an_artifact", text_attention.__file__
    )
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert NAME in attentions(tiny_lens("llama", "full", **PROMPTS))


@pytest.mark.parametrize(("wanted", "device", "expected"), [
    (None, "cpu", True), (None, "meta", False), (True, "cpu", True), (True, "meta", True), (False, "cpu", False),
])  # fmt: skip
def test_it_is_for_a_cpu_unless_it_is_asked_for(monkeypatch, wanted, device, expected):
    decoder = tiny_lens().decoder
    monkeypatch.setattr("consistency_lens.lens_decoder.can_attend", lambda base, length: True)
    decoder.projection.to(device)
    decoder.attends_in_place = wanted
    assert decoder.may_attend_in_place(8) == expected
    with torch.no_grad():
        assert not decoder.may_attend_in_place(8)


def test_the_trial_of_a_model_draws_nothing_and_is_not_misled_by_dropout(monkeypatch):
    monkeypatch.setattr(text_attention, "_works", {})
    lora = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": 0.5}
    decoder = disturb(tiny_lens("llama", "lora", lora=lora), scale=0.5).decoder.train()
    modes, state = [module.training for module in decoder.modules()], torch.get_rng_state()
    assert decoder.may_attend_in_place(8)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in decoder.modules()] == modes
