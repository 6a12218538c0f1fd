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
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    Olmo2Config,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
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

SMALL_TEXT = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# families that differ from these in one way or another; for tests of just that
UNUSUAL: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    # embeddings narrower than the stream, and no final norm
    "opt_350m": (OPTConfig, {**POSITIONS, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": 48}),
    # ALiBi by the places of keys, whatever is masked
    "mpt": (MptConfig, {**SMALL_TEXT, "d_model": WIDTH, "n_layers": NUM_LAYERS, "n_heads": NUM_HEADS}),
    # `get_decoder` gives the whole model; routers among the linear layers; attention in chunks
    "llama4": (
        Llama4TextConfig,
        {
            **GROUPED,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
        },
    ),
    # `get_decoder` gives the head
    "modernbert": (
        ModernBertDecoderConfig,
        {**ROTARY, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    # blocks that give lists, and no cache
    "gpt1": (OpenAIGPTConfig, {**SMALL_TEXT, "n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": NUM_HEADS}),
    # positions that begin anew with each piece of embeddings
    "roberta": (RobertaConfig, {**ROTARY, "is_decoder": True}),
    # a state in place of keys and values, in all blocks or in some
    "mamba": (MambaConfig, {**SMALL_TEXT, "hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS}),
    "lfm2": (Lfm2Config, {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `family`, one of `FAMILIES` or `UNUSUAL`, in eval mode; `overrides` are fields of its config."""
    config_class, arguments = {**UNUSUAL, **FAMILIES}[family]
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
