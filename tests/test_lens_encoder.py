"""The encoder: what it starts as, where it is cut, and that a prompt that runs once gives what one a row gives."""

import pytest
import torch
from flop_count import flops
from tiny_lenses import LAYER, PROMPTS, activations, disturb, tiny_lens, tiny_tokenizer
from tiny_models import FAMILIES, NUM_LAYERS, WIDTH, tiny_model

from consistency_lens import ConsistencyLensModel, ResidualStream, Subject, cached_passes
from consistency_lens.straight_through import row_keys

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXT_IDS = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23], [5, 6, 7, 8], [9, 9, 9, 9]])
# gaps before and behind, a text of which nothing is read, and one of which the first token alone is
MASK = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()


def hidden_states(model, token_ids: list[int], layer: int) -> torch.Tensor:
    """The subject's own residual after block `layer` (-1: its embeddings) at the last token, (d,)."""
    ids = torch.tensor([token_ids])
    if layer == -1:
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[0][0, -1]
    return Subject(model, layer).activations(ids, torch.ones_like(ids))[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_subjects_own_layer(family):
    lens = tiny_lens(family)
    expected = hidden_states(lens.subject.model, [1, 9, 10, 11], LAYER)
    torch.testing.assert_close(lens.encode("w9 w10 w11")[0], expected, **CLOSE)


@pytest.mark.parametrize("output_layer, num_blocks", [(None, LAYER + 1), (0, 0), (1, 1), (-1, NUM_LAYERS)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3"])
def test_is_cut_after_output_layer_blocks(family, output_layer, num_blocks):
    lens = tiny_lens(family, output_layer=output_layer)
    assert len(ResidualStream(lens.encoder.base).blocks) == num_blocks
    expected = hidden_states(lens.subject.model, [1, 9, 10, 11], num_blocks - 1)
    torch.testing.assert_close(lens.encode("w9 w10 w11")[0], expected, **CLOSE)
    assert len(lens.subject.stream.blocks) == len(ResidualStream(lens.decoder.base).blocks) == NUM_LAYERS


@pytest.mark.parametrize("prompt", ["<text>", "w7 <text> w8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_a_text(family, prompt):
    lens = tiny_lens(family, encoder_prompt=prompt)
    texts = ["w9 w10", "w11 w12 w13 w14 w15", "", "w16"]
    alone = torch.cat([lens.encode(text) for text in texts])
    torch.testing.assert_close(lens.encode(texts), alone, **CLOSE)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "mpt"])
def test_padding_counts_for_no_window_and_for_no_distance(family):
    model = {} if family == "mpt" else {"sliding_window": 3}
    lens = tiny_lens(family, model=model, encoder_prompt="w7 w8 <text> w9")
    texts = ["w9", "w11 w12 w13 w14 w15 w16", ""]
    alone = torch.cat([lens.encode(text) for text in texts])
    torch.testing.assert_close(lens.encode(texts), alone, **CLOSE)


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize(("family", "training"), [("llama", "full"), ("llama", "lora"), ("gemma2", "full")])
def test_a_text_embedded_for_the_encoder_as_it_is_drawn_is_the_text_embedded_afterwards(family, training, chunk_size):
    lens, found = disturb(tiny_lens(family, training, **PROMPTS)), {}
    for reader in (lens.encoder, None):
        given = activations(3).requires_grad_()
        keys = row_keys(0, 0, torch.arange(3))
        text = lens.decoder.generate_soft(given, keys, 4, tau=0.7, chunk_size=chunk_size, reader=reader)
        assert (text.embeddings is None) == (reader is None)
        embeddings = lens.encoder.embed_text(text, keys, 0.7) if reader is None else text.embeddings
        lens.zero_grad()
        (lens.encoder(embeddings).sin().sum() + text.logits.square().mean()).backward()
        gradients = {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None}
        found[reader] = {"embeddings": embeddings, "activations": given.grad} | gradients
    assert found[None].keys() == found[lens.encoder].keys() and len(found[None]) > 10
    for name, gradient in found[None].items():
        torch.testing.assert_close(found[lens.encoder][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_strings_and_token_ids_agree():
    lens = tiny_lens(**PROMPTS)
    texts = [" ".join(f"w{i}" for i in row) for row in TEXT_IDS.tolist()]
    torch.testing.assert_close(lens.encode(texts), lens.encode(TEXT_IDS))


def test_empty_text_is_the_prompt_alone():
    lens = tiny_lens()
    torch.testing.assert_close(lens.encode("")[0], hidden_states(lens.subject.model, [1], LAYER), **CLOSE)


@pytest.mark.parametrize("texts", ["", ["", "w9 w10"]])
def test_empty_text_without_prompt_is_refused(texts):
    lens = ConsistencyLensModel.from_subject(tiny_model("llama"), tiny_tokenizer(bos=False), LAYER)
    assert lens.encode("w9").shape == (1, WIDTH)
    with pytest.raises(ValueError, match="neither BOS nor prompt; pass at least one word"):
        lens.encode(texts)


def test_no_texts_are_refused():
    with pytest.raises(ValueError, match="encode: got no texts"):
        tiny_lens().encode([])


def test_statistics_come_back_in_the_reconstruction():
    lens = tiny_lens()
    with torch.no_grad():
        lens.encoder.output_map.weight.zero_()
        lens.encoder.output_map.bias.fill_(2.0)
    torch.testing.assert_close(lens.encode("w9")[0], lens.mean + 2.0 * lens.rms)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("prompt", ["<text>", "w7 w8 <text> w9"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_runs_once_gives_the_same(family, prompt, mask):
    # a window shorter than the prompt, where the family has one
    model = {"sliding_window": 3} if family.startswith("gemma") else {}
    lens = disturb(tiny_lens(family, "full", model, encoder_prompt=prompt))
    found = []
    for use_cache in (True, False):
        embeddings = lens.encoder.embed_ids(TEXT_IDS)
        reconstruction = lens.encoder(embeddings, mask, use_cache=use_cache)
        parts = {name: p for name, p in lens.encoder.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(reconstruction.square().mean(), list(parts.values()), allow_unused=True)
        found.append((reconstruction, dict(zip(parts, grads, strict=True))))
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@pytest.mark.parametrize("prompt", ["<text>", "w7 w8 <text> w9"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_finishes_the_last_token_alone(family, prompt, monkeypatch):
    monkeypatch.setattr(cached_passes, "PASS_COST_ON_CPU", 1)
    model = {"sliding_window": 3} if family.startswith("gemma") else {}
    lens, found = disturb(tiny_lens(family, "full", model, encoder_prompt=prompt)), []
    finished = []
    last = ResidualStream(lens.encoder.base).blocks[-1]
    last.register_forward_hook(lambda *args: finished.append(args[2][0].shape[-2]))
    for stops_early in (True, False):
        lens.encoder.stops_early = stops_early
        embeddings = lens.encoder.embed_ids(TEXT_IDS)
        reconstruction = lens.encoder(embeddings)
        parts = {name: p for name, p in lens.encoder.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(reconstruction.square().mean(), list(parts.values()), allow_unused=True)
        found.append((reconstruction, dict(zip(parts, grads, strict=True))))
    before, behind = (len(part.split()) for part in prompt.split("<text>"))
    # what stands before the text, BOS included, runs whole either way
    assert finished == [1 + before, 1, 1 + before, TEXT_IDS.shape[1] + behind]
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@pytest.mark.parametrize(("rows", "stops"), [(64, True), (16, False)])
def test_a_pass_ends_early_where_that_is_less_work(rows, stops):
    lens, finished = tiny_lens(), []
    lens.encoder.base.layers[-1].mlp.register_forward_hook(lambda *args: finished.append(args[2].shape[1]))
    ids = TEXT_IDS[:1].repeat(rows, 2)
    assert (len(ids) * (ids.shape[1] - 1) > 2 * 2 * cached_passes.PASS_COST_ON_CPU) == stops
    lens.encoder(lens.encoder.embed_ids(ids))
    assert finished[-1] == (1 if stops else ids.shape[1])


def test_a_prompt_is_run_once_a_batch():
    lens = tiny_lens("llama", encoder_prompt="w5 w6 w7 w8 <text>")
    with torch.no_grad():
        embeddings = lens.encoder.embed_ids(TEXT_IDS[:1].expand(32, -1))
        once, each = (flops(lambda cached=c: lens.encoder(embeddings, use_cache=cached)) for c in (True, False))
    assert once < 0.55 * each  # 4 tokens of 9 a row


def test_a_text_without_a_suffix_that_is_empty_is_the_prompt(monkeypatch):
    lens = tiny_lens("llama", encoder_prompt="w5 w6 <text>")
    nothing = lens.encoder.embed_ids(torch.zeros(2, 0, dtype=torch.long))
    expected = hidden_states(lens.subject.model, [1, 5, 6], LAYER)
    torch.testing.assert_close(lens.encoder(nothing), expected.expand(2, -1), **CLOSE)
