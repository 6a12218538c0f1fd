"""The encoder: text to activation."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .artifact_subject import base_from_config, load_subject
from .cached_passes import PromptCache, cost_on, prompt_cache
from .configuration_consistency_lens import LensEncoderConfig
from .context_cache import ContextComplete, ending
from .lens_clone import LensClone, Normaliser, clone_subject, embed_sampled
from .lens_decoder import SoftText
from .residual_stream import ResidualStream, gather_positions, truncated
from .straight_through import fold_in

NO_TEXTS = "encode: got no texts; pass at least one"
NOTHING_TO_READ = "encode: got an empty text, and the encoder has neither BOS nor prompt; pass at least one word"


class LensEncoder(LensClone):
    """Text to activation: the subject's clone, cut after the block whose output it must reproduce."""

    config_class = LensEncoderConfig
    artifact_kind = "Encoder of a consistency lens (text to activation)"
    stops_early = True
    """Whether a pass over a text may end in the last block, where that is less work."""

    def __init__(self, config: LensEncoderConfig, base: PreTrainedModel | None = None):
        """`base` is a whole clone of the subject; what the encoder does not need is cut from it here."""
        base = base if base is not None else base_from_config(config.base_config)
        paths = {"blocks": config.blocks, "final_norm": config.final_norm}
        stream = ResidualStream(base, **paths)
        width, scale, embedding = stream.width, stream.embedding_scale, stream.input_embedding
        num_blocks = num_encoder_blocks(config, stream.num_layers)
        super().__init__(config, truncated(base, num_blocks, **paths))
        self.num_blocks = num_blocks
        self.embedding_scale = scale
        device = embedding.get_parameter("weight").device
        self.normaliser = Normaliser(width, device)
        self.output_map = nn.Linear(width, width, device=device)
        with torch.no_grad():
            self.output_map.weight.copy_(torch.eye(width))
            self.output_map.bias.zero_()
        self.add_prompt_parameters()
        self.post_init()

    def forward(self, text_embeddings: Tensor, text_mask: Tensor | None = None, use_cache: bool = True) -> Tensor:
        """Reconstructs Â (B, d) in float32 from the embeddings of a text (B, T, d), as embedded by `embed_ids`.

        Args:
            text_embeddings: (B, T, d).
            text_mask: (B, T) bool, False at what is not to be read: before or after a text that is shorter than T.
            use_cache: False runs the prompt before the text once a row, and not once; the reference for tests.

        Raises:
            ValueError: if there is nothing to read: no text, or an empty one without BOS and prompt.
        """
        batch, dtype = len(text_embeddings), self.token_embedding.weight.dtype
        if batch == 0:
            raise ValueError(NO_TEXTS)
        prefix, suffix = (piece.to(dtype) for piece in self.prompt())
        rows = torch.cat([text_embeddings.to(dtype), suffix.expand(batch, -1, -1)], dim=1)
        if len(prefix) + rows.shape[1] == 0:
            raise ValueError(NOTHING_TO_READ)
        before: PromptCache | None = None
        has_blocks = self.config.output_layer != 0  # without one there is nothing that could be kept
        caches = use_cache and has_blocks and self.may_cache
        if caches and rows.shape[1] > 0 and not self.checkpoints_gradients():
            before = prompt_cache(self.base, prefix, batch)
            rows = rows + before.nothing
        else:
            rows = torch.cat([prefix.expand(batch, -1, -1), rows], dim=1)
        if text_mask is None or bool(text_mask.all()):
            hidden = self.last_state(rows, None if before is None else before.cache)
        else:
            left, right = text_mask.new_ones(batch, len(prefix)), text_mask.new_ones(batch, len(suffix))
            hidden = self.last_hidden(rows, torch.cat([left, text_mask, right], dim=1).long(), before)
        normalised = self.normaliser.normalise(hidden).to(self.output_map.weight.dtype)
        return self.normaliser.denormalise(self.output_map(normalised))

    def last_state(self, rows: Tensor, cache: DynamicCache | None) -> Tensor:
        """The base's output (B, d) at the last of the embeddings of `rows` (B, C, d), behind those of a cache.

        Of the tokens before it the last block gives keys and values alone, in a pass that ends there, if that is less
        work than another pass.
        """
        num_before, another_pass = len(rows) * (rows.shape[1] - 1), 2 * self.num_blocks * cost_on(rows.device)
        may_stop = self.stops_early and self.base._compiled_call_impl is None
        if cache is not None and may_stop and num_before > another_pass:
            cache = ending(cache, self.num_blocks)
            with suppress(ContextComplete):
                self.run(rows[:, :-1], cache)
            rows = rows[:, -1:]
        return self.run(rows, cache)[:, -1]

    def run(self, rows: Tensor, cache: DynamicCache | None) -> Tensor:
        """The base's output (B, C, d) for the embeddings of `rows` (B, C, d), behind those of a cache."""
        output = self.base(inputs_embeds=rows, past_key_values=cache, use_cache=cache is not None)
        return cast(Tensor, output.last_hidden_state)

    def last_hidden(self, rows: Tensor, mask: Tensor, before: PromptCache | None) -> Tensor:
        """The base's output (B, d) at each row's last real token, which is the prompt's where the text is empty.

        `mask` (B, P + C), 0 or 1, is of all that is read, `rows` (B, C, d) what has not run yet.
        """
        counts = mask.sum(dim=1)
        if not bool(counts.all()):
            raise ValueError(NOTHING_TO_READ)
        start = mask.shape[1] - rows.shape[1]
        # What is not read goes behind all that is, where nothing sees it: before it, it would count for a sliding
        # window (Mistral, Gemma) and for the distances that ALiBi goes by (MPT), though a mask hid it.
        order = mask[:, start:].argsort(dim=1, descending=True, stable=True)
        rows = gather_positions(rows, order)
        hidden = self.run(rows, None if before is None else before.cache)
        last = counts - 1 - start
        found = hidden[torch.arange(len(hidden), device=hidden.device), last.clamp(min=0)]
        return found if before is None else torch.where(last[:, None] < 0, before.end, found)

    def embed_ids(self, text_ids: Tensor) -> Tensor:
        """Embeddings of token ids, (B, T) -> (B, T, d), in the encoder's own table."""
        return self.token_embedding(text_ids)

    def embed_text(self, text: SoftText, keys: Tensor | None, tau: float) -> Tensor:
        """Embeddings (B, T, d) of a soft text, whose gradient reaches the decoder's logits."""
        embed = self.row_embedder(text.token_ids, keys, tau)
        rows = text.predictions.read(lambda logits, rows: {"embeddings": embed(logits, rows)})["embeddings"]
        return rows.unflatten(0, text.token_ids.shape)

    def row_embedder(self, token_ids: Tensor, keys: Tensor | None, tau: float) -> Callable[[Tensor, slice], Tensor]:
        """Makes, of the logits (n, V) of some of the B * T tokens of a text, the embeddings (n, d) of those."""
        length = token_ids.shape[1]
        flat_ids = token_ids.flatten()
        flat_keys = None if keys is None else torch.stack([fold_in(keys, t) for t in range(length)], dim=1).flatten()

        def embed(logits: Tensor, rows: slice) -> Tensor:
            row_keys = None if flat_keys is None else flat_keys[rows]
            return embed_sampled([self], logits, flat_ids[rows], row_keys, tau)[0]

        return embed

    @classmethod
    def from_subject(cls, subject: PreTrainedModel, config: LensEncoderConfig) -> Self:
        """An encoder whose base is a cut clone of `subject`, sharing its tensors unless it will be fully trained."""
        return cls(config, clone_subject(subject, share_weights=config.training != "full"))

    @classmethod
    def from_artifact_config(cls, config: Any, base_model: Any, base_kwargs: dict[str, Any]) -> Self:
        if config.training == "full" and base_model is None:
            return cls(config, base_from_config(config.base_config, base_kwargs))
        return cls.from_subject(load_subject(config, base_model, base_kwargs), config)


def num_encoder_blocks(config: LensEncoderConfig, total: int) -> int:
    """How many of the subject's `total` blocks the encoder keeps (see `LensEncoderConfig.output_layer`)."""
    wanted = config.layer + 1 if config.output_layer is None else config.output_layer
    wanted = total if wanted == -1 else wanted
    if not 0 <= wanted <= total:
        raise ValueError(f"output_layer must lie in -1..{total}, got {config.output_layer}")
    return wanted
