"""Which models can go on behind tokens that have run, and that the others run the whole of a text anew."""

import pytest
import torch
from tiny_lenses import activations, disturb, keys, tiny_lens
from tiny_models import FAMILIES, UNUSUAL, random_tokens, tiny_model
from transformers import AutoModel

from consistency_lens.cached_passes import keeps_keys_and_values

WITHOUT = {"mamba", "gpt1", "lfm2", "roberta"}
PROMPTS = {"decoder_prompt": "w3 w4 w5 w6 <embed> w7", "encoder_prompt": "w7 w8 <text> w9"}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_what_keeps_keys_and_values_is_known_by_its_code(family):
    assert keeps_keys_and_values(tiny_model(family)) == (family not in WITHOUT)


@pytest.mark.parametrize("family", UNUSUAL)
def test_a_text_is_that_of_whole_passes(family):
    """Mamba and GPT-1 take a cache without a word, and leave out all that is in it."""
    lens = disturb(tiny_lens(family, **PROMPTS))
    found = [lens.decoder.generate_soft(activations(), keys(), 6, use_cache=cached) for cached in (True, False)]
    assert torch.equal(found[0].token_ids, found[1].token_ids)
    torch.testing.assert_close(found[0].logits, found[1].logits, **CLOSE)
    forced = [lens.decoder(activations(), found[0].token_ids, use_cache=cached) for cached in (True, False)]
    torch.testing.assert_close(forced[0], found[0].logits, **CLOSE)
    torch.testing.assert_close(forced[1], found[0].logits, **CLOSE)
    embeddings = lens.encoder.embed_ids(random_tokens(6, 6, 6)[0])
    read = [lens.encoder(embeddings, use_cache=cached) for cached in (True, False)]
    torch.testing.assert_close(*read, **CLOSE)


def test_running_a_text_anew_is_said_once(caplog):
    lens = tiny_lens("gpt1")
    for _ in range(2):
        lens.decode_ids(activations())
    assert [record.message.split(":")[0] for record in caplog.records] == ["OpenAIGPTLMHeadModel"]


@pytest.mark.parametrize("family", ["opt_350m", "mamba"])
def test_an_unusual_subject_has_a_lens_that_explains_and_is_the_same_when_loaded(family, tmp_path):
    lens = disturb(tiny_lens(family, **PROMPTS))
    lens.subject.model.save_pretrained(tmp_path / "subject")
    lens.save_pretrained(tmp_path / "lens")
    loaded = AutoModel.from_pretrained(tmp_path / "lens", base_model=str(tmp_path / "subject"))
    assert loaded.explain("w9 w10 w11") == lens.explain("w9 w10 w11")
