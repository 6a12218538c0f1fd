"""Which implementation of attention a model runs, and where it must be another for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

AUTO = "auto"
FLASH = "flash_attention_2"


def attention_to_try(wish: str, dtype: str, on_gpu: bool) -> list[str | None]:
    """The implementations to load a model with, best first; None leaves it to transformers: sdpa, else eager.

    FlashAttention 2 runs halves alone, and on GPUs.

    Raises:
        ValueError: if it is wished for where it cannot run.
    """
    if wish == AUTO:
        return [FLASH, None] if on_gpu and dtype != "float32" and is_flash_attn_2_available() else [None]
    if wish.startswith("flash_attention") and (dtype == "float32" or not on_gpu):
        raise ValueError(
            f"attention: {wish} takes bfloat16 or float16 on a GPU, got {dtype}{'' if on_gpu else ' on a CPU'}; "
            "set attention to auto"
        )
    return [wish]


def runs_flash(model: PreTrainedModel) -> bool:
    """Whether the model runs FlashAttention, which takes neither float32 nor 4-D masks."""
    return "flash" in (model.config._attn_implementation or "")


def leave_flash(model: PreTrainedModel) -> None:
    """Puts sdpa, or eager where the architecture lacks it, in the place of FlashAttention."""
    if runs_flash(model):
        model.set_attn_implementation(model.get_correct_attn_implementation(None))


@contextmanager
def attention_with_masks(model: PreTrainedModel) -> Iterator[None]:
    """Lets the model take 4-D masks inside the `with` block."""
    usual = model.config._attn_implementation
    leave_flash(model)
    try:
        yield
    finally:
        if model.config._attn_implementation != usual:
            model.set_attn_implementation(usual)


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Has the model run an attention of `AttentionInterface` inside the `with` block, where transformers exchanges its
    own; its weights and its other settings are not looked at again."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual
