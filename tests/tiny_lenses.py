"""Tiny lenses over the subjects of `tiny_models`, a tokenizer of one word per token, and what tests do with them."""

from typing import Any

import torch
from tiny_models import VOCAB_SIZE, WIDTH, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from consistency_lens import ConsistencyLensModel
from consistency_lens.straight_through import row_keys

LAYER, NUM_TEXT_TOKENS = 1, 4
PROMPTS = {"decoder_prompt": "w3 w4 <embed> w5 w6", "encoder_prompt": "w7 <text> w8"}
INJECTED = {**PROMPTS, "injection_layers": 2}
LORA_TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "gemma3": ["q_proj", "v_proj"]}


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Words `w3 .. w96`, split at white space; the special tokens are those of the tiny models' configs."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB_SIZE))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos_token = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<pad>", **bos_token
    )


def tiny_lens(
    family: str = "llama", training: str = "frozen", model: dict[str, Any] | None = None, **arguments: Any
) -> ConsistencyLensModel:
    """A new lens in eval mode, with statistics that are not 0 and 1.

    Args:
        family: of the subject.
        training: of the clones.
        model: overrides of the subject's config.
        arguments: of `ConsistencyLensModel.from_subject`.
    """
    torch.manual_seed(0)
    if training == "lora" and "lora" not in arguments:
        arguments["lora"] = {"r": 2, "lora_alpha": 4, "target_modules": LORA_TARGETS[family]}
    arguments = {"layer": LAYER, "num_text_tokens": NUM_TEXT_TOKENS, **arguments}
    lens = ConsistencyLensModel.from_subject(
        tiny_model(family, **(model or {})), tiny_tokenizer(), training=training, **arguments
    )
    lens.set_statistics(0.1 * torch.randn(WIDTH), 1.3)
    return lens.eval()


def disturb(lens: ConsistencyLensModel, scale: float = 0.05) -> ConsistencyLensModel:
    """Moves every trainable tensor, LoRA's zero matrices included, by seeded noise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lens.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return lens


def activations(batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Random activations (B, d), far enough apart to be read as different texts."""
    return 1.5 * torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


def keys(batch: int = 3, draw: int = 0) -> torch.Tensor:
    """Noise keys (B,) of the first rows."""
    return row_keys(0, 0, torch.arange(batch), draw)


def trainable(lens: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in lens.named_parameters() if parameter.requires_grad}


def gradients(loss: torch.Tensor, lens: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every trainable tensor by name; None where the loss does not reach it."""
    parameters = trainable(lens)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))
