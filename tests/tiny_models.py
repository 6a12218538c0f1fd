"""Tiny causal language models of many families, made from configs: seeded, in eval mode, with weights that matter."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE, WIDTH, NUM_LAYERS, NUM_HEADS, MAX_POSITIONS = 97, 32, 3, 4, 128

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROTARY = {**COMMON, "intermediate_size": 48, "max_position_embeddings": MAX_POSITIONS}
GROUPED = {**ROTARY, "num_key_value_heads": 2}
POSITIONS = {**COMMON, "max_position_embeddings": MAX_POSITIONS}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}

# family -> (config class, arguments)
FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, GROUPED),
    "mistral": (MistralConfig, {**GROUPED, "head_dim": 8}),
    "qwen2": (Qwen2Config, GROUPED),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 8}),
    "gemma2": (Gemma2Config, GEMMA),
    "gemma3": (
        Gemma3TextConfig,
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": (Olmo2Config, GROUPED),
    "phi": (PhiConfig, ROTARY),
    "phi3": (Phi3Config, {**GROUPED, "original_max_position_embeddings": MAX_POSITIONS}),
    "gpt2": (GPT2Config, POSITIONS),
    "gpt_neox": (GPTNeoXConfig, ROTARY),
    "opt": (OPTConfig, {**POSITIONS, "word_embed_proj_dim": WIDTH, "ffn_dim": 48}),
    "falcon": (FalconConfig, {**POSITIONS, "alibi": False}),
    "bloom": (BloomConfig, COMMON),
    "gptj": (GPTJConfig, {**POSITIONS, "rotary_dim": 4}),
    "gpt_neo": (
        GPTNeoConfig,
        {**POSITIONS, "attention_types": [[["global", "local", "global"], 1]], "window_size": 64},
    ),
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `family` in eval mode; `overrides` are fields of its config."""
    config_class, arguments = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config_class(**{**arguments, **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices of gain about 1, so that every block matters; norms and biases away from their defaults.
            parameter.copy_(0.18 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model


def random_tokens(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded random input ids and their attention mask, (B, S) each, one row for each length."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(3, VOCAB_SIZE, attention_mask.shape, generator=generator)
    return input_ids * attention_mask, attention_mask
