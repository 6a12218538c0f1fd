"""What the hashes of weights and tokenizers tell apart, and what they do not."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from tokenizers import AddedToken

from consistency_lens.data.subject_loading import load_subject_and_tokenizer
from consistency_lens.fingerprints import tensors_hash, tokenizer_hash, weights_hash


def test_weights_hash_sees_a_changed_weight():
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    assert weights_hash(other) == weights_hash(model)
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert weights_hash(other) != weights_hash(model)


def test_weights_hash_sees_the_dtype_and_not_where_the_weights_are():
    model = tiny_model("llama")
    expected = weights_hash(model)
    assert weights_hash(copy.deepcopy(model).bfloat16()) != expected
    cpu_offload(model, torch.device("cpu"))
    assert weights_hash(model) == expected


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_weights_hash_sees_the_scales_of_quantised_weights(tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def loaded(name, factor):
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        model.model.layers[1].mlp.up_proj.weight.data *= factor
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        return load_subject_and_tokenizer(str(tmp_path / name), quantization=quantization, device="cpu").model

    # twice the weights have the same quantised values, with twice the scale
    model, same, doubled = loaded("one", 1), loaded("one", 1), loaded("two", 2)
    assert weights_hash(model) == weights_hash(same) != weights_hash(doubled)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert weights_hash(model) == weights_hash(same)


def test_tensors_hash_sees_names_and_values_and_not_their_order():
    tensors = {"one": torch.zeros(2), "other": torch.ones(2)}
    expected = tensors_hash(tensors)
    assert tensors_hash(dict(reversed(tensors.items()))) == expected
    changed = [{**tensors, "one": torch.full((2,), 0.5)}, {"one": torch.zeros(2), "another": torch.ones(2)}]
    assert len({expected, *map(tensors_hash, changed)}) == 3


def test_tokenizer_hash_sees_words_and_special_tokens():
    expected = tokenizer_hash(tiny_tokenizer())
    assert tokenizer_hash(tiny_tokenizer()) == expected
    other, special = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens([AddedToken("more")])
    special.pad_token = special.eos_token
    assert len({expected, tokenizer_hash(other), tokenizer_hash(special)}) == 3
