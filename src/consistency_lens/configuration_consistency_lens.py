"""Configurations of the decoder, the encoder and the lens that holds both.

Decoder and encoder are clones of one subject. Each configuration therefore carries the subject's name, its pinned
revision and its own configuration, so that a fully trained clone can be rebuilt without the subject's weights.
"""

from typing import Any

from transformers import PreTrainedConfig

TRAINING_MODES = ("full", "lora", "frozen")


class LensCloneConfig(PreTrainedConfig):
    """What decoder and encoder have in common.

    Args:
        base_model_name_or_path: Hub id or folder of the subject.
        base_model_revision: the commit (or other revision) that the subject was loaded at; None for a
            local folder.
        base_config: the subject's configuration as a dictionary.
        layer: index k of the block whose output is read, 0-based.
        num_text_tokens: T, the length of a text in tokens.
        training: "full" (the whole clone is trained), "lora" (adapters through PEFT) or "frozen" (only projections and
            prompts are trained). Tells also what an artifact holds.
        lora: keyword arguments of `peft.LoraConfig`, for `training="lora"`.
        prompt: the prompt with its slot, as given; kept for people.
        prefix_ids, suffix_ids: the prompt's tokens before and after the slot; these are what runs.
        blocks, final_norm: dotted paths of the subject's blocks and final norm, for a layout that `ResidualStream`
            does not find by itself.
        trainable_prompt: whether the prompt's embeddings are parameters, started from the tokens' embeddings.

    Raises:
        ValueError: for an unknown training mode, a negative layer, or `num_text_tokens` < 1.
    """

    def __init__(
        self,
        base_model_name_or_path: str = "",
        base_model_revision: str | None = None,
        base_config: dict[str, Any] | None = None,
        layer: int = 0,
        num_text_tokens: int = 8,
        training: str = "frozen",
        lora: dict[str, Any] | None = None,
        prompt: str = "",
        prefix_ids: list[int] | None = None,
        suffix_ids: list[int] | None = None,
        trainable_prompt: bool = True,
        blocks: str | None = None,
        final_norm: str | None = None,
        **kwargs: Any,
    ):
        if training not in TRAINING_MODES:
            raise ValueError(f"training must be one of {', '.join(TRAINING_MODES)}, got {training!r}")
        if layer < 0:
            raise ValueError(f"layer must be 0 or more (0-based block index), got {layer}")
        if num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {num_text_tokens}; 8 is a good start")
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_config = base_config or {}
        self.layer = layer
        self.num_text_tokens = num_text_tokens
        self.training = training
        self.lora = lora or {}
        self.prompt = prompt
        self.prefix_ids = prefix_ids or []
        self.suffix_ids = suffix_ids or []
        self.trainable_prompt = trainable_prompt
        self.blocks = blocks
        self.final_norm = final_norm
        super().__init__(**kwargs)


class LensDecoderConfig(LensCloneConfig):
    """Configuration of a `LensDecoder` (activation to text).

    Args:
        injection_layers: n; the slot's input of blocks 1..n is overwritten by a projection of its own each (block 0
            reads the slot's embedding).
        stop_token_id: a text ends before this token; None for texts of always T tokens.
        kwargs: see `LensCloneConfig`.
    """

    model_type = "consistency_lens_decoder"

    def __init__(self, injection_layers: int = 0, stop_token_id: int | None = None, **kwargs: Any):
        self.injection_layers = injection_layers
        self.stop_token_id = stop_token_id
        super().__init__(**kwargs)


class LensEncoderConfig(LensCloneConfig):
    """Configuration of a `LensEncoder` (text to activation).

    Args:
        output_layer: number of blocks that the encoder keeps: 0 reads the embeddings, -1 keeps all, None means
            `layer + 1`, so that the encoder's output lies in the same space as the activation.
        kwargs: see `LensCloneConfig`.
    """

    model_type = "consistency_lens_encoder"

    def __init__(self, output_layer: int | None = None, **kwargs: Any):
        self.output_layer = output_layer
        super().__init__(**kwargs)


class ConsistencyLensConfig(PreTrainedConfig):
    """Configuration of a `ConsistencyLensModel`: the configurations of its decoder and its encoder.

    Raises:
        ValueError: if the two do not read the same layer of the same subject with the same T.
    """

    model_type = "consistency_lens"

    def __init__(
        self,
        decoder: LensDecoderConfig | dict[str, Any] | None = None,
        encoder: LensEncoderConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.decoder = LensDecoderConfig(**(decoder or {})) if not isinstance(decoder, LensDecoderConfig) else decoder
        self.encoder = LensEncoderConfig(**(encoder or {})) if not isinstance(encoder, LensEncoderConfig) else encoder
        for name in ("base_model_name_or_path", "base_model_revision", "layer", "num_text_tokens"):
            of_decoder, of_encoder = getattr(self.decoder, name), getattr(self.encoder, name)
            if of_decoder != of_encoder:
                raise ValueError(
                    f"{name}: the decoder has {of_decoder!r} and the encoder {of_encoder!r}; make them equal"
                )
        super().__init__(**kwargs)

    @property
    def layer(self) -> int:
        return self.decoder.layer

    @property
    def num_text_tokens(self) -> int:
        return self.decoder.num_text_tokens

    @property
    def base_model_name_or_path(self) -> str:
        return self.decoder.base_model_name_or_path

    @property
    def base_model_revision(self) -> str | None:
        return self.decoder.base_model_revision

    @property
    def base_config(self) -> dict[str, Any]:
        return self.decoder.base_config
