"""The frozen subject and its tokenizer, from the Hub or a folder: in any precision, on one device or over several."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..attention import AUTO, attention_to_try
from ..causality import check_causal
from ..optional_packages import require
from ..quantised import keep_gradients
from .dataset_reading import cause_of

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")
# LLM.int8() rounds activations to 8 bits too, but for columns with an entry above its threshold. Below any entry, only
# weights are rounded: else the gradient of a KL that is small already is off by 30 % and more, and what one row gives
# depends on the rows beside it.
WEIGHTS_ALONE = 1e-6


class LoadedSubject(NamedTuple):
    """A subject as it was loaded."""

    model: PreTrainedModel
    """Frozen, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    revision: str | None
    """The commit on the Hub; None for a local folder."""


def load_subject_and_tokenizer(
    model: str,
    revision: str | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    attention: str = AUTO,
    device: str | torch.device | None = None,
    device_map: str | None = None,
) -> LoadedSubject:
    """The frozen subject and its tokenizer, in the evaluation mode that both sides of a lens are measured in.

    Args:
        model: Hub id or folder of a causal LM.
        revision: commit, tag or branch on the Hub; it is pinned to the commit.
        dtype: of the weights, "float32", "bfloat16" or "float16"; of those that stay unquantised with `quantization`.
        quantization: "8bit" or "4bit" (NF4), by bitsandbytes.
        attention: implementation, as transformers names it; "auto" is FlashAttention 2 where it is installed, the
            dtype is a half and the model goes to a GPU, if the architecture has it; else sdpa, else eager.
        device: where the model goes; by default it stays where transformers puts it, on the CPU.
        device_map: spreads a model that is larger than a device, such as "auto"; instead of `device`.

    Raises:
        ValueError: if the model or its tokenizer cannot be loaded, does not fit the device or is not causal, or an
            argument is wrong.
    """
    check_loading(dtype, quantization, device, device_map, attention)
    revision = pinned_revision(model, revision)
    tokenizer = load_tokenizer(model, revision)
    subject = load_model(model, revision, dtype, quantization, attention, device, device_map)
    return LoadedSubject(subject, tokenizer, revision)


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a subject.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise not_loaded(model, error) from error


def check_layers(model: str, revision: str | None, layers: Sequence[int]) -> None:
    """Checks by the configuration alone, before weights are loaded, that a subject has these blocks.

    Raises:
        ValueError: if it has not, or the configuration cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise not_loaded(model, error) from error
    # a configuration may not say; the loaded subject does
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if num_layers is None:
        return
    beyond = [layer for layer in layers if not 0 <= layer < num_layers]
    if beyond:
        raise ValueError(
            f"layer must lie in 0..{num_layers - 1} ({model!r} has {num_layers} blocks), got {beyond[0]}; layer k is "
            "the output of block k, counted from 0"
        )


def load_model(
    model: str,
    revision: str | None,
    dtype: str,
    quantization: str | None,
    attention: str,
    device: str | torch.device | None,
    device_map: str | None,
) -> PreTrainedModel:
    """The subject of `load_subject_and_tokenizer`, with arguments that `check_loading` has passed.

    Raises:
        ValueError: if the model cannot be loaded, does not fit the device, or is not causal.
    """
    arguments: dict[str, Any] = {"revision": revision, "dtype": getattr(torch, dtype)}
    if quantization is not None:
        arguments["quantization_config"] = _quantization_config(quantization, dtype)
    if device is not None or device_map is not None:
        arguments["device_map"] = {"": torch.device(device)} if device is not None else device_map
    subject = _load(model, arguments, attention_to_try(attention, dtype, _on_gpu(device, device_map)))
    logger.info("attention of %s: %s", model, subject.config._attn_implementation)
    keep_gradients(subject)
    check_causal(subject.eval().requires_grad_(False), model)
    return subject


def pinned_revision(model: str, revision: str | None = None) -> str | None:
    """The commit that a Hub subject is at, so that what is made from it names it for good; None for a local folder.

    Raises:
        ValueError: if there is no such subject.
    """
    if Path(model).is_dir():
        return None
    try:
        config_file = cached_file(model, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise not_loaded(model, error) from error
    return extract_commit_hash(config_file, None) or revision


def not_loaded(model: str, error: Exception, attention: str | None = None) -> ValueError:
    """The one-line error for a subject that cannot be loaded, with its cause; `attention` if one was asked for."""
    if attention is not None:
        return ValueError(
            f"model: cannot load {model!r} with attention {attention!r}; set attention to auto ({cause_of(error)})"
        )
    return ValueError(f"model: cannot load {model!r}; pass a Hub id or a folder with a causal LM ({cause_of(error)})")


def check_loading(
    dtype: str,
    quantization: str | None,
    device: str | torch.device | None,
    device_map: str | None,
    attention: str = AUTO,
) -> None:
    """Checks how a subject is to be loaded, as far as that needs no subject.

    Raises:
        ValueError: naming the first argument that is wrong.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if device is not None and device_map is not None:
        raise ValueError(f"device: got {str(device)!r} and device_map {device_map!r}; pass one of them")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: got {str(device)!r}, which is not to be had here; try cpu") from error
    attention_to_try(attention, dtype, _on_gpu(device, device_map))


def _quantization_config(quantization: str, dtype: str) -> BitsAndBytesConfig:
    require("bitsandbytes", extra="quant", needed_for=f"quantization {quantization}")
    if quantization == "8bit":
        # else a warning at each pass of each layer: it takes its inputs in float16, whatever they come in
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=WEIGHTS_ALONE)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )


def _on_gpu(device: str | torch.device | None, device_map: str | None) -> bool:
    """Whether the model goes to a GPU; a map may say so or not, and is taken at its best."""
    return device_map is not None or (device is not None and torch.device(device).type == "cuda")


def _load(model: str, arguments: dict[str, Any], attentions: list[str | None]) -> PreTrainedModel:
    """The model with the first attention that its architecture has."""
    *better, attention = attentions
    for candidate in better:
        try:
            return AutoModelForCausalLM.from_pretrained(model, attn_implementation=candidate, **arguments)
        except (ImportError, ValueError):
            pass  # transformers says so before it reads any weights
    try:
        return AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, **arguments)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"model: {model!r} does not fit the device ({cause_of(error)}); pass device_map='auto' "
            "(--device_map auto), a smaller dtype or a quantization"
        ) from error
    except (ImportError, OSError, ValueError) as error:
        raise not_loaded(model, error, attention) from error
