import copy
import logging

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from consistency_lens.data import generation
from consistency_lens.data.generation import sample_documents

BOS, EOS, VOCAB = 0, 1, 12
SMALL = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
FAMILIES = {
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SMALL,
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL),
    "neox": GPTNeoXConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **SMALL),
    "opt": OPTConfig(
        hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, **SMALL
    ),
    "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL),
    # a state in place of keys and values, in all blocks or in some
    "mamba": MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **SMALL),
    "lfm2": Lfm2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        **SMALL,
    ),
    "gemma2": Gemma2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        **SMALL,
    ),
}


def make_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln" not in name:
            parameter.data.normal_(std=0.3)
    return model


def make_tokenizer(**special_tokens):
    vocab = {"<s>": BOS, "</s>": EOS} | {f"w{n}": n for n in range(2, VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)), **special_tokens)


@pytest.fixture(scope="module")
def model():
    return make_model(FAMILIES["llama"])


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


def sample(model, tokenizer, num_documents=40, max_length=40, **kwargs):
    return sample_documents(model, tokenizer, num_documents, max_length, progress=False, **kwargs)["input_ids"][:]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_greedy_equals_uncached(family, tokenizer):
    model = make_model(FAMILIES[family])
    expected = [BOS]
    with torch.no_grad():
        while len(expected) < 24 and (len(expected) == 1 or expected[-1] != EOS):
            expected.append(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax().item())
    assert len(expected) > 2
    assert sample(model, tokenizer, 1, 24, temperature=0) == [expected]


def test_documents_start_at_bos_and_end_with_the_first_eos(model, tokenizer):
    documents = sample(model, tokenizer)
    assert all(document[0] == BOS and len(document) <= 40 for document in documents)
    assert all(EOS not in document[:-1] for document in documents)
    assert all(document[-1] == EOS for document in documents if len(document) < 40)
    assert {True, False} == {len(document) < 40 for document in documents}


def test_same_seed_gives_the_same_documents_and_another_seed_others(model, tokenizer):
    first = sample(model, tokenizer, seed=1)
    assert sample(model, tokenizer, seed=1) == first
    assert sample(model, tokenizer, seed=2) != first


def test_documents_do_not_depend_on_the_batch_size(model, tokenizer):
    assert sample(model, tokenizer, batch_size=3) == sample(model, tokenizer, batch_size=64)


def test_finished_rows_leave_the_batch(model, tokenizer, monkeypatch):
    expected = sample(model, tokenizer, batch_size=40)
    batch_sizes = []
    model = copy.deepcopy(model)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(generation, "COMPACT_EVERY", 4)
    assert sample(model, tokenizer, batch_size=40) == expected
    assert batch_sizes[0] == 40
    assert 0 < min(batch_sizes[:39]) < 20


def test_duplicates_are_dropped_and_a_shortfall_is_reported(model, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        documents = sample(model, tokenizer, 5, top_k=1)
    assert len(documents) == 1
    assert "only 1 different documents of 5 in 10 draws" in caplog.text


def test_top_k_draws_among_the_k_most_probable_tokens(model, tokenizer):
    for document in sample(model, tokenizer, 8, 20, top_k=2):
        logits = model(input_ids=torch.tensor([document])).logits[0]
        choices = logits.topk(2).indices[:-1].tolist()
        assert all(token in pair for token, pair in zip(document[1:], choices, strict=True))


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0))
    logits[4] = float("-inf")
    uniforms = (torch.arange(4096) + 0.5) / 4096
    drawn = generation._draw_tokens(logits.expand(4096, 6), uniforms, temperature=0.7, top_k=None)
    shares = torch.bincount(drawn, minlength=6) / 4096
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), atol=1 / 2048, rtol=0)


def test_a_tokenizer_without_bos_starts_at_eos_which_does_not_end_it(model):
    documents = sample(model, make_tokenizer(eos_token="</s>"))
    assert all(document[0] == EOS for document in documents)
    assert max(map(len, documents)) > 10


def test_prompt_ids_are_kept(model, tokenizer):
    assert all(document[:3] == [5, EOS, 6] for document in sample(model, tokenizer, prompt_ids=[5, EOS, 6]))


def test_the_training_mode_of_the_model_is_restored(model, tokenizer):
    model = copy.deepcopy(model).train()
    sample(model, tokenizer, 1, 4)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_documents": 0}, "num_documents must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature .* got -1.0"),
        ({"max_length": 1}, "max_length=1 leaves no room"),
        ({"max_length": 65}, "max_length=65 is beyond the model's context of 64"),
        ({"prompt_ids": []}, "no token to start from"),
    ],
)
def test_bad_arguments_are_named(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(make_model(FAMILIES["gpt2"]), tokenizer, **arguments)


def test_a_tokenizer_without_bos_and_eos_needs_a_prompt(model):
    with pytest.raises(ValueError, match="prompt_ids"):
        sample(model, make_tokenizer())


def test_a_model_that_could_give_a_kv_cache_and_does_not_is_refused(tokenizer):
    config = BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=False, **SMALL
    )
    with pytest.raises(ValueError, match="no KV cache"):
        sample(AutoModelForCausalLM.from_config(config), tokenizer)
