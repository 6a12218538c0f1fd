"""The subject and the tokens of the benchmarks of activation caches."""

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from consistency_lens.data.corpus import corpus_from_rows

BATCH, LENGTH, LAYER, NUM_LAYERS, WIDTH, VOCAB_SIZE, MIN_POSITION = 32, 128, 7, 12, 256, 8192, 8


def make_model() -> LlamaForCausalLM:
    """A model of 12 blocks with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the model's vocabulary."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}))
    )


def make_corpus(num_sequences: int) -> Dataset:
    """Random tokens, one sequence of each document."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCAB_SIZE, (num_sequences, LENGTH))
    return corpus_from_rows({"input_ids": row.tolist(), "document": index} for index, row in enumerate(tokens))
