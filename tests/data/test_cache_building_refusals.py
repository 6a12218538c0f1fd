"""What cannot be built: subjects, texts and arguments that are refused."""

import copy

import pytest
from cache_builds import ARGUMENTS, LAYER, VOCAB, build, build_layers, corpus, make_subject, make_tokenizer, subject
from datasets import Dataset
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.subject import Subject

__all__ = ["build", "build_layers", "corpus", "subject"]


def test_activations_that_are_not_finite_are_refused(build):
    subject = make_subject()
    subject.model.model.layers[LAYER].mlp.down_proj.weight.data[0, 0] = float("nan")
    message = r"18 of 18 activations of layer 1 are not finite \(the first at position \d+ of document \d+\); check"
    with pytest.raises(ValueError, match=message):
        build(subject=subject)


def test_a_subject_that_overflows_float16_is_refused_and_float32_is_the_way_out(build):
    subject = make_subject()
    subject.model.model.layers[LAYER].mlp.down_proj.weight.data *= 1e9
    with pytest.raises(ValueError, match=r"not finite .*float16 overflows.*load it in float32 \(--dtype float32\)"):
        build(subject=Subject(copy.deepcopy(subject.model).half(), LAYER))
    build("wide", subject=subject)


def test_float16_overflow_is_refused_and_float32_is_the_way_out(build):
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data *= 1e8
    with pytest.raises(ValueError, match=r"overflows float16 .* pass dtype='float32' \(--cache_dtype float32\)"):
        build(subject=subject, dtype="float16")
    build("wide", subject=subject)


def test_text_that_is_too_short_throughout_is_refused(build):
    with pytest.raises(ValueError, match="longest of 26 sequences has 20 tokens, too short for min_position=19"):
        build(min_position=19)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions_per_sequence": 0}, "positions_per_sequence must be at least 1, got 0"),
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"min_position": -1}, "min_position must be 0 or more, got -1"),
        ({"dtype": "int8"}, "dtype must be 'float16' or 'float32', got 'int8'"),
        ({"max_norm": 1.5}, "max_norm is a multiple of the median norm and must be at least 2, got 1.5"),
        ({"rows_per_shard": 2**28}, "rows_per_shard=268435456 contexts of up to 20 tokens are too many"),
        ({"corpus": Dataset.from_dict({"text": ["a"]})}, r"lacks \['input_ids', 'document'\]"),
        ({"corpus": corpus_from_rows([])}, "the corpus is empty"),
        ({"corpus": corpus_from_rows([{"input_ids": [VOCAB] * 9, "document": 1}])}, "token ids from 30 to 30"),
        ({"tokenizer": make_tokenizer(VOCAB + 1)}, "tokenizer has 31 tokens, but the subject only 30"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_folder(build, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)
    assert not (tmp_path / "cache").exists()


def test_sequences_beyond_the_context_of_the_subject_are_refused(tmp_path):
    corpus = corpus_from_rows([{"input_ids": [5] * 129, "document": 1}])
    with pytest.raises(ValueError, match="has 129 tokens, beyond the subject's context of 128; tokenise with max_len"):
        build_activation_cache(
            Subject(tiny_model("gpt2"), 1), corpus, tmp_path / "cache", tokenizer=tiny_tokenizer(), **ARGUMENTS
        )


def test_a_layer_that_is_not_there_is_refused(build_layers, tmp_path):
    with pytest.raises(ValueError, match="layer must lie in 0..2"):
        build_layers([1, 3])
    assert not (tmp_path / "layers").exists()


def test_an_unknown_argument_is_refused(build):
    with pytest.raises(TypeError, match="positions_per_sequnce"):
        build(positions_per_sequnce=3)
