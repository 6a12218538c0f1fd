"""Small caches for tests: a subject of three blocks, a tokenizer of 30 words, a corpus of 26 sequences."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from consistency_lens.data.cache_building import build_activation_cache, build_activation_caches
from consistency_lens.data.cache_verification import verify_cache
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.subject import Subject

VOCAB, WIDTH, LAYER, NUM_SEQUENCES, MIN_POSITION = 30, 16, 1, 24, 4
ARGUMENTS = {
    "subject_name": "tiny",
    "dataset_name": "random",
    "positions_per_sequence": 3,
    "min_position": MIN_POSITION,
    "dtype": "float32",
    "rows_per_shard": 18,
    "progress": False,
}


def make_subject(layer=LAYER):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return Subject(LlamaForCausalLM(config), layer)


def make_tokenizer(vocab_size=VOCAB):
    vocab = {f"w{n}": n for n in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)), eos_token="w0")


def make_corpus(num_sequences=NUM_SEQUENCES) -> Dataset:
    """Sequences of 8 to 20 tokens, two of each document, and two that are too short."""
    generator = np.random.default_rng(0)
    documents = generator.integers(0, 2**63, num_sequences // 2)
    rows = [
        {"input_ids": generator.integers(0, VOCAB, generator.integers(8, 21)), "document": documents[n // 2]}
        for n in range(num_sequences)
    ]
    rows[5:5] = [{"input_ids": [1] * 3, "document": 7}, {"input_ids": [1] * (MIN_POSITION + 1), "document": 8}]
    return corpus_from_rows(rows)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_verified(path: Path) -> None:
    """Every check of a cache passes."""
    assert [check for check in verify_cache(path, progress=False) if not check.passed] == []


def shard_hashes(cache):
    return [shard["sha256"] for shard in cache.provenance["shards"]]


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


@pytest.fixture
def build(subject, corpus, tmp_path):
    def build(path="cache", **changes):
        arguments = {"subject": subject, "corpus": corpus, "tokenizer": make_tokenizer(), **ARGUMENTS} | changes
        return build_activation_cache(path=tmp_path / path, **arguments)

    return build


@pytest.fixture
def build_layers(subject, corpus, tmp_path):
    def build_layers(layers, path="layers", **changes):
        arguments = {"stream": subject.stream, "tokenizer": make_tokenizer(), **ARGUMENTS} | changes
        paths = {layer: tmp_path / path / str(layer) for layer in layers}
        return build_activation_caches(corpus=arguments.pop("corpus", corpus), paths=paths, **arguments)

    return build_layers
