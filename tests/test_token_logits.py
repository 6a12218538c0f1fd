"""Logits in chunks: the model's own head on given states, and the values, texts and gradients of all at once."""

import pytest
import torch
from tiny_lenses import INJECTED, PROMPTS, activations, disturb, gradients, keys, tiny_lens, trainable
from tiny_models import FAMILIES, MAX_POSITIONS, random_tokens, tiny_model
from transformers import CohereConfig, GraniteConfig, MixtralConfig

from consistency_lens import ResidualStream, Subject
from consistency_lens.losses import entropy, token_log_probabilities
from consistency_lens.token_logits import TokenLogits, head_logits

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# factors on logits, and outputs of blocks that others do not have
UNUSUAL = {
    "cohere": (CohereConfig, {**SMALL, "logit_scale": 0.3}),
    "granite": (GraniteConfig, {**SMALL, "logits_scaling": 3.0}),
    "mixtral": (MixtralConfig, {**SMALL, "num_local_experts": 2}),
    "opt_350m": (FAMILIES["opt"][0], {**FAMILIES["opt"][1], "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TEXT_IDS = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23], [5, 6, 7, 8]])


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_head_and_blocks_apart_give_the_logits_of_the_whole(monkeypatch, family):
    monkeypatch.setattr("tiny_models.FAMILIES", FAMILIES | UNUSUAL)
    model, (ids, mask) = tiny_model(family), random_tokens(6, 4)
    decoder, positions = model.get_decoder(), torch.tensor([[1, 5], [3, 0]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    with ResidualStream(model).capture_last_states() as captured:
        assert model(input_ids=ids, attention_mask=mask).logits.shape == (1, 1, 97)
    assert torch.equal(head_logits(model, captured.activations.flatten(0, 1)).view_as(expected), expected)
    assert model.get_decoder() is decoder and torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    subject = Subject(model, 1)
    context = subject.context(ids, mask, positions)
    states = subject.context(ids, mask, positions, with_head=False)
    assert states.logits.shape[-1] < context.logits.shape[-1]
    torch.testing.assert_close(subject.head(states.logits.flatten(0, 1)).view_as(context.logits), context.logits)
    replaced = context.activations.roll(1, dims=0)
    for apart, whole in ((states, context), (states._replace(cache=None), context._replace(cache=None))):
        found = subject.head(subject.replaced_logits(apart, replaced, with_head=False).flatten(0, 1))
        torch.testing.assert_close(found.view_as(whole.logits), subject.replaced_logits(whole, replaced))


def test_an_error_in_the_head_leaves_the_model_whole():
    model = tiny_model("llama")
    decoder = model.get_decoder()
    with pytest.raises(RuntimeError):
        head_logits(model, torch.zeros(2, 5))
    assert model.get_decoder() is decoder


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_are_read_in_order_and_cover_all_rows(chunk_size):
    states, table = torch.randn(7, 4, requires_grad=True), torch.randn(4, 9)
    seen = []

    def read(logits, rows):
        seen.append(rows)
        return {"entropy": entropy(logits), "first": logits[:, :2]}

    chunked, whole = TokenLogits(states, lambda s: s @ table, chunk_size), TokenLogits(states @ table)
    found = chunked.read(read)
    assert [i for rows in seen for i in range(7)[rows]] == list(range(7))
    expected = whole.read(read)
    torch.testing.assert_close(found, expected)
    losses = (sum(tensor.square().sum() for tensor in of.values()) for of in (found, expected))
    torch.testing.assert_close(*(torch.autograd.grad(loss, states)[0] for loss in losses))


def values_reader(activations, ids):
    def read(logits, rows):
        return {"entropy": entropy(logits), "log_p": token_log_probabilities(logits, ids.flatten()[rows])}

    return read


def passes(lens, chunk_size):
    """Text, values, reconstruction and gradients of each path through the lens."""
    settings = {"reader": values_reader, "chunk_size": chunk_size}
    for inputs in (
        {"noise_keys": keys(), "tau": 0.7},
        {"text_ids": TEXT_IDS},
        {"text_ids": TEXT_IDS, "straight_through": True},
    ):
        output = lens(activations(), **inputs, **settings)
        loss = output.reconstruction.square().mean() + sum(v.square().mean() for v in output.token_values.values())
        yield output.text_ids, output.token_values, output.reconstruction, gradients(loss, lens)


def check_passes(lens, chunk_size=2):
    for found, expected in zip(passes(lens, chunk_size), passes(lens, 0), strict=True):
        assert all(gradient is not None for gradient in expected[-1].values())
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_of_a_lens_is_the_same_in_chunks(family):
    check_passes(disturb(tiny_lens(family, "full", **PROMPTS)))


@pytest.mark.parametrize("training", ["full", "lora", "frozen"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_every_path_is_the_same_with_adapters_injections_and_checkpoints(training, checkpointed):
    settings = dict(INJECTED)
    if training == "lora":
        pytest.importorskip("peft")
        settings["lora"] = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    lens = disturb(tiny_lens("llama", training, **settings)).train()
    assert training != "lora" or any(".lm_head.lora_" in name for name in trainable(lens))
    if checkpointed:
        lens.activation_checkpointing_enable()
    check_passes(lens)


def test_texts_are_drawn_in_chunks_as_at_once():
    lens = disturb(tiny_lens())
    for noise in (None, keys(7)):
        at_once = lens.decode_ids(activations(7), keys=noise)
        assert torch.equal(lens.decode_ids(activations(7), keys=noise, chunk_size=3), at_once)


def test_without_a_reader_the_caller_gets_all_logits():
    lens = tiny_lens()
    with torch.no_grad():
        found, expected = (lens(activations(), text_ids=TEXT_IDS, chunk_size=size).logits for size in (2, 0))
    torch.testing.assert_close(found, expected)
