"""The configuration of a tuned lens."""

from typing import Any

from transformers import PreTrainedConfig

PRECONDITIONERS = ("none", "whitening", "prism")
PLACES = ("after_norm", "before_norm")


class TunedLensConfig(PreTrainedConfig):
    """What a tuned lens is built from; it fits one model alone, for that model's head decodes it.

    Args:
        base_model_name_or_path: Hub id or folder of the subject.
        base_model_revision: the commit that it was loaded at; None for a local folder.
        base_config: the subject's configuration as a dictionary.
        width: d, of its residual stream.
        num_layers: L, its blocks. The last one has no translator.
        vocab_size: V, the logits of its head.
        rank: k, of the translators `h + (h U) V^T + c`; None for full matrices, `h + h W + c`.
        learn_temperature: whether the logits of each layer are divided by a temperature of its own.
        preconditioner: the basis that translators work in: "none", "whitening" (centred, each dimension scaled to
            unit variance) or "prism" (whitened and rotated to the principal axes).
        translator_place: "after_norm" (the final norm comes first) or "before_norm", as lenses published by
            AlignmentResearch/tuned-lens have it.
        blocks, final_norm: see `ResidualStream`.

    Raises:
        ValueError: for a rank below 1 or above the width, or an unknown preconditioner or place.
    """

    model_type = "consistency_lens_tuned"

    def __init__(
        self,
        base_model_name_or_path: str = "",
        base_model_revision: str | None = None,
        base_config: dict[str, Any] | None = None,
        width: int = 1,
        num_layers: int = 1,
        vocab_size: int = 1,
        rank: int | None = None,
        learn_temperature: bool = True,
        preconditioner: str = "none",
        translator_place: str = "after_norm",
        blocks: str | None = None,
        final_norm: str | None = None,
        **kwargs: Any,
    ):
        if rank is not None and not 1 <= rank <= width:
            raise ValueError(f"rank must lie in 1..{width} (the width of the subject), or be full, got {rank}")
        if preconditioner not in PRECONDITIONERS:
            raise ValueError(f"preconditioner must be one of {', '.join(PRECONDITIONERS)}, got {preconditioner!r}")
        if translator_place not in PLACES:
            raise ValueError(f"translator_place must be one of {', '.join(PLACES)}, got {translator_place!r}")
        if preconditioner != "none" and translator_place == "before_norm":
            raise ValueError(
                f"preconditioner: got {preconditioner!r} with translators before the norm, but it is fitted on "
                "normalised residuals; set it to none"
            )
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_config = base_config or {}
        self.width = width
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.rank = rank
        self.learn_temperature = learn_temperature
        self.preconditioner = preconditioner
        self.translator_place = translator_place
        self.blocks = blocks
        self.final_norm = final_norm
        super().__init__(**kwargs)


def default_rank(width: int) -> int:
    """k = clip(floor(d / 32), 64, 256), and 256 from d = 4096 on; never above the width."""
    return min(width, 256 if width >= 4096 else min(256, max(64, width // 32)))
