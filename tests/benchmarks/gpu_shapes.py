"""What the GPU benchmarks run on: Llamas with random weights, their lenses, and random text.

S=256, T=16, K=8: of each sequence of 256 tokens eight activations are read, of each of which a text of 16 tokens is
made. The subject is bfloat16, the clones share its weights and train adapters, their optimizer's states are float32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from consistency_lens import ConsistencyLensModel
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.data.on_the_fly import OnTheFlyActivations

ADAPTERS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
MIN_POSITION = 10
GROUP_SIZE = 4  # texts of an activation under policy gradient
WORDS = 97  # of the tokenizer, of which only the special tokens are ever used


@dataclass(frozen=True)
class Shape:
    """A subject and how much a benchmark gives it to do.

    Attributes:
        sizes: of the configuration.
        batch: texts of a step, on each device; under policy gradient an activation has `GROUP_SIZE` of them.
        cache_sequences: sequences that an activation cache is made of.
        length, num_text_tokens, positions: S, T and K.
    """

    name: str
    sizes: dict[str, Any]
    batch: int
    cache_sequences: int
    length: int = 256
    num_text_tokens: int = 16
    positions: int = 8

    @property
    def layer(self) -> int:
        """Whose output is read: that of the block in the middle."""
        return self.sizes["num_hidden_layers"] // 2

    def activations(self, objective: str) -> int:
        """How many a step of an objective reads, on each device."""
        return self.batch // GROUP_SIZE if objective == "policy_gradient" else self.batch

    def make_subject(self, device: torch.device | str) -> LlamaForCausalLM:
        """In bfloat16 from the start, for a copy in float32 may not fit."""
        config = LlamaConfig(**self.sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)

    def make_lens(self, device: torch.device | str, clones: str = "lora") -> ConsistencyLensModel:
        """A lens in training; `clones` as in its configuration."""
        lens = ConsistencyLensModel.from_subject(
            self.make_subject(device),
            word_tokenizer(),
            self.layer,
            num_text_tokens=self.num_text_tokens,
            training=clones,
            lora=ADAPTERS if clones == "lora" else None,
        )
        return lens.train()

    def make_corpus(self, num_sequences: int) -> Any:
        """Random tokens, one sequence of each document."""
        tokens = np.random.default_rng(0).integers(3, self.sizes["vocab_size"], (num_sequences, self.length))
        return corpus_from_rows({"input_ids": row.tolist(), "document": index} for index, row in enumerate(tokens))

    def make_source(self, lens: ConsistencyLensModel, num_rows: int) -> OnTheFlyActivations:
        """Rows that are read on the fly, K of each sequence."""
        return OnTheFlyActivations.from_corpus(
            lens.subject,
            self.make_corpus(-(-num_rows // self.positions)),
            provenance={},
            positions_per_sequence=self.positions,
            min_position=MIN_POSITION,
            seed=0,
        )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one word per token: only its special tokens are of use here."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "1b",
            {
                "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
                "max_position_embeddings": 2048,
            },
            batch=1024,
            cache_sequences=16384,
        ),
        Shape(
            "7b",
            {
                "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
                "max_position_embeddings": 2048,
            },
            batch=256,
            cache_sequences=8192,
        ),
    )
}  # fmt: skip
TINY = Shape(
    "tiny",
    {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 64,
    },
    batch=8,
    cache_sequences=8,
    length=16,
    num_text_tokens=3,
    positions=2,
)  # fmt: skip
