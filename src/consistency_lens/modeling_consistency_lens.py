"""The decoder (activation to text), the encoder (text to activation) and the lens that joins them.

Every trainable tensor is used inside a `forward`, so DDP, FSDP and DeepSpeed see every gradient. The soft path
(`noise_keys`) generates a text with straight-through gradients and reconstructs from it; the teacher-forced path
(`text_ids`) scores given tokens and reconstructs from them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .configuration_consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig
from .explanation import Explanation, explain_text, text_ids
from .lens_clone import (
    LensClone,
    Normaliser,
    TrainedTensorsModel,
    base_from_config,
    clone_subject,
    encode_prompt,
    load_subject,
)
from .residual_stream import ResidualStream, truncated
from .straight_through import fold_in, sample_tokens, straight_through_embedding
from .subject import Subject

EMBED_SLOT = "<embed>"
TEXT_SLOT = "<text>"
NOTHING_TO_READ = "encode: got an empty text, and the encoder has neither BOS nor prompt; pass at least one word"


class SoftText(NamedTuple):
    """A generated text: `token_ids` (B, T); `logits` (B, T, V), those that each token was drawn from."""

    token_ids: Tensor
    logits: Tensor


class DecodedText(NamedTuple):
    """Texts read from activations: `token_ids` (B, T) and the same as strings."""

    token_ids: Tensor
    texts: list[str]


@dataclass
class LensOutput(ModelOutput):
    """What one pass of the lens gives.

    Attributes:
        reconstruction: Â, (B, d), float32, in the units of the subject's residual stream.
        text_ids: (B, T) the text that the encoder read.
        logits: (B, T, V) the decoder's logits for each token of its text.
    """

    reconstruction: Tensor | None = None
    text_ids: Tensor | None = None
    logits: Tensor | None = None


class LensDecoder(LensClone):
    """Activation to text: the subject's clone, prompted with a projection of the activation."""

    config_class = LensDecoderConfig

    def __init__(self, config: LensDecoderConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base if base is not None else base_from_config(config.base_config))
        stream = ResidualStream(self.base)
        self.embedding_scale = stream.embedding_scale
        if not 0 <= config.injection_layers < stream.num_layers:
            raise ValueError(f"injection_layers must lie in 0..{stream.num_layers - 1}, got {config.injection_layers}")
        device, width = stream.input_embedding.get_parameter("weight").device, stream.width
        self.normaliser = Normaliser(width, device)
        self.projection = nn.Linear(width, width, device=device)
        self.injections = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(config.injection_layers))
        self.add_prompt_parameters()
        self.post_init()

    def start_projections(self) -> None:
        """Scaled identity: a mean activation enters the slot with the norm of a mean token embedding."""
        table = self.token_embedding.weight
        width = table.shape[1]
        scale = table.float().norm(dim=1).mean() * self.embedding_scale / width**0.5
        with torch.no_grad():
            for projection in [self.projection, *self.injections]:
                projection.weight.copy_(torch.eye(width, device=scale.device) * scale)
                projection.bias.zero_()

    def slot_embedding(self, activations: Tensor) -> Tensor:
        """What the slot holds: proj(normalise(A)), (B, 1, d)."""
        return self.projection(self.normaliser.normalise(activations).to(self.projection.weight.dtype))[:, None]

    @contextmanager
    def injected(self, activations: Tensor, slot: int) -> Iterator[None]:
        """Overwrites the input of blocks 1..n at index `slot` of the running chunk by their own projections."""
        with ExitStack() as hooks:
            if self.injections:
                normalised = self.normaliser.normalise(activations).to(self.projection.weight.dtype)
                for block, projection in zip(ResidualStream(self.base).blocks[1:], self.injections, strict=False):
                    hooks.enter_context(overwritten_input(block, slot, projection(normalised)))
            yield

    def forward(self, activations: Tensor, text_ids: Tensor) -> Tensor:
        """Teacher forcing: logits (B, T, V) of the tokens `text_ids` (B, T), given A (B, d) and the tokens before."""
        batch = len(activations)
        embedding = self.token_embedding
        prefix, suffix = self.prompt()
        pieces = [
            prefix.expand(batch, -1, -1),
            self.slot_embedding(activations),
            suffix.expand(batch, -1, -1),
            embedding(text_ids[:, :-1]),
        ]
        inputs = torch.cat([piece.to(embedding.weight.dtype) for piece in pieces], dim=1)
        with self.injected(activations, slot=len(prefix)):
            return self.base(inputs_embeds=inputs, use_cache=False, logits_to_keep=text_ids.shape[1]).logits

    def generate_soft(
        self,
        activations: Tensor,
        keys: Tensor | None,
        num_text_tokens: int,
        tau: float = 1.0,
        temperature: float = 1.0,
        use_cache: bool = True,
    ) -> SoftText:
        """Generates T tokens, each drawn by Gumbel-max, with straight-through gradients through all steps.

        Args:
            activations: A, (B, d).
            keys: (B,) int64 noise keys of the rows (`straight_through.row_keys`); None for greedy text.
            num_text_tokens: T.
            tau: temperature of the relaxed gradient; it never changes the sample.
            temperature: temperature of the sample.
            use_cache: False recomputes the whole sequence at every step, the reference for tests. Gradient
                checkpointing forces it, because a checkpointed block drops the cache that it is handed.

        Raises:
            ValueError: if T is less than one.
        """
        if num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {num_text_tokens}; 8 is a good start")
        if self.checkpoints_gradients():  # without gradients too: the block drops it in train mode
            use_cache = False
        embedding = self.token_embedding
        dtype = embedding.weight.dtype
        prefix, suffix = (piece.to(dtype) for piece in self.prompt())
        batch = len(activations)
        slot = self.slot_embedding(activations).to(dtype)
        head = torch.cat([slot, suffix.expand(batch, -1, -1)], dim=1)
        if use_cache:
            chunk, cache, slot_index = head, self.prefix_cache(prefix, batch), 0
        else:
            chunk, cache, slot_index = torch.cat([prefix.expand(batch, -1, -1), head], dim=1), None, len(prefix)

        ids: list[Tensor] = []
        logits: list[Tensor] = []
        for step in range(num_text_tokens):
            inject = step == 0 or not use_cache
            with self.injected(activations, slot_index) if inject else ExitStack():
                output = self.base(inputs_embeds=chunk, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
            logits.append(output.logits[:, -1])
            step_keys = None if keys is None else fold_in(keys, step)
            ids.append(sample_tokens(logits[-1], step_keys, temperature))
            if step == num_text_tokens - 1:
                break
            token = self.embed_text(logits[-1], ids[-1], step_keys, tau)[:, None].to(dtype)
            chunk = token if use_cache else torch.cat([chunk, token], dim=1)
        return SoftText(torch.stack(ids, dim=1), torch.stack(logits, dim=1))

    def checkpoints_gradients(self) -> bool:
        """Whether a training pass would recompute blocks in its backward pass."""
        return self.training and any(getattr(block, "gradient_checkpointing", False) for block in self.base.modules())

    def embed_text(self, logits: Tensor, ids: Tensor, keys: Tensor | None, tau: float) -> Tensor:
        """Embeddings (N, d) of sampled tokens in this clone's table, straight-through where a gradient is wanted."""
        return embed_sampled(self, logits, ids, keys, tau)

    def prefix_cache(self, prefix: Tensor, batch: int) -> DynamicCache:
        """Keys and values of the prompt before the slot: run once, not once per row, then expanded to the batch."""
        if len(prefix) == 0:
            return DynamicCache()
        once = DynamicCache()
        self.base.get_decoder()(inputs_embeds=prefix[None], past_key_values=once, use_cache=True)
        expanded = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v, *_ in once]
        return DynamicCache(expanded)

    @classmethod
    def from_subject(cls, subject: PreTrainedModel, config: LensDecoderConfig) -> Self:
        """A decoder whose base is a clone of `subject`, sharing its tensors unless the clone will be fully trained."""
        decoder = cls(config, clone_subject(subject, share_weights=config.training != "full"))
        decoder.start_projections()
        return decoder

    @classmethod
    def from_artifact_config(cls, config: Any, base_model: Any, base_kwargs: dict[str, Any]) -> Self:
        if config.training == "full" and base_model is None:
            return cls(config, base_from_config(config.base_config, base_kwargs))
        return cls.from_subject(load_subject(config, base_model, base_kwargs), config)


class LensEncoder(LensClone):
    """Text to activation: the subject's clone, cut after the block whose output it must reproduce."""

    config_class = LensEncoderConfig

    def __init__(self, config: LensEncoderConfig, base: PreTrainedModel | None = None):
        """`base` is a whole clone of the subject; what the encoder does not need is cut from it here."""
        base = base if base is not None else base_from_config(config.base_config)
        stream = ResidualStream(base)
        width, scale, embedding = stream.width, stream.embedding_scale, stream.input_embedding
        super().__init__(config, truncated(base, num_encoder_blocks(config, stream.num_layers)))
        self.embedding_scale = scale
        device = embedding.get_parameter("weight").device
        self.normaliser = Normaliser(width, device)
        self.output_map = nn.Linear(width, width, device=device)
        with torch.no_grad():
            self.output_map.weight.copy_(torch.eye(width))
            self.output_map.bias.zero_()
        self.add_prompt_parameters()
        self.post_init()

    def forward(self, text_embeddings: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Reconstructs Â (B, d) in float32 from the embeddings of a text (B, T, d), as embedded by `embed_ids`.

        Args:
            text_embeddings: (B, T, d).
            text_mask: (B, T) bool, False where a text is shorter than T; such texts stand at the right end.

        Raises:
            ValueError: if there is nothing to read: an empty text without BOS and prompt.
        """
        batch = len(text_embeddings)
        embedding = self.token_embedding
        prefix, suffix = self.prompt()
        pieces = [prefix.expand(batch, -1, -1), text_embeddings, suffix.expand(batch, -1, -1)]
        inputs = torch.cat([piece.to(embedding.weight.dtype) for piece in pieces], dim=1)
        if inputs.shape[1] == 0:
            raise ValueError(NOTHING_TO_READ)
        if text_mask is None or bool(text_mask.all()):
            hidden = self.base(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1]
        else:
            left, right = text_mask.new_ones(batch, len(prefix)), text_mask.new_ones(batch, len(suffix))
            hidden = self.last_hidden(inputs, torch.cat([left, text_mask, right], dim=1).long())
        normalised = self.normaliser.normalise(hidden).to(self.output_map.weight.dtype)
        return self.normaliser.denormalise(self.output_map(normalised))

    def last_hidden(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """The base's output (B, d) at each row's last real token, which is the prompt's where the text is empty."""
        if not bool(mask.any(dim=1).all()):
            raise ValueError(NOTHING_TO_READ)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.base(
            inputs_embeds=inputs, use_cache=False, attention_mask=mask, position_ids=position_ids
        ).last_hidden_state
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def embed_ids(self, text_ids: Tensor) -> Tensor:
        """Embeddings of token ids, (B, T) -> (B, T, d), in the encoder's own table."""
        return self.token_embedding(text_ids)

    def embed_text(self, text: SoftText, keys: Tensor | None, tau: float) -> Tensor:
        """Embeddings (B, T, d) of a soft text, whose gradient reaches the decoder's logits."""
        batch, length, vocabulary = text.logits.shape
        flat_keys = None if keys is None else torch.stack([fold_in(keys, t) for t in range(length)], dim=1).flatten()
        rows = embed_sampled(self, text.logits.reshape(-1, vocabulary), text.token_ids.flatten(), flat_keys, tau)
        return rows.view(batch, length, -1)

    @classmethod
    def from_subject(cls, subject: PreTrainedModel, config: LensEncoderConfig) -> Self:
        """An encoder whose base is a cut clone of `subject`, sharing its tensors unless it will be fully trained."""
        return cls(config, clone_subject(subject, share_weights=config.training != "full"))

    @classmethod
    def from_artifact_config(cls, config: Any, base_model: Any, base_kwargs: dict[str, Any]) -> Self:
        if config.training == "full" and base_model is None:
            return cls(config, base_from_config(config.base_config, base_kwargs))
        return cls.from_subject(load_subject(config, base_model, base_kwargs), config)


class ConsistencyLensModel(TrainedTensorsModel):
    """Decoder and encoder, and the subject that judges both (kept outside the module tree: it is never trained)."""

    config_class = ConsistencyLensConfig

    def __init__(
        self,
        config: ConsistencyLensConfig,
        decoder: LensDecoder | None = None,
        encoder: LensEncoder | None = None,
        subject_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.decoder = decoder if decoder is not None else LensDecoder(config.decoder)
        self.encoder = encoder if encoder is not None else LensEncoder(config.encoder)
        self._subject: list[Subject] = []  # a list hides it from nn.Module: no saving, no wrapping, no gradients
        if subject_model is not None:
            self.attach_subject(subject_model)
        self.post_init()

    @classmethod
    def from_subject(
        cls,
        subject: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        *,
        num_text_tokens: int = 8,
        training: str = "frozen",
        lora: dict[str, Any] | None = None,
        decoder_prompt: str = EMBED_SLOT,
        encoder_prompt: str = TEXT_SLOT,
        trainable_prompt: bool = True,
        injection_layers: int = 0,
        output_layer: int | None = None,
        revision: str | None = None,
    ) -> Self:
        """A new lens for `subject` at `layer`; see the configurations for the arguments.

        Raises:
            ValueError: for a layer out of range, T < 1, a prompt without its slot, an unknown training mode.
        """
        stream = ResidualStream(subject)
        stream.check_layer(layer)
        common = {
            "base_model_name_or_path": subject.config.name_or_path,
            "base_model_revision": revision,
            "base_config": subject.config.to_dict(),
            "layer": layer,
            "num_text_tokens": num_text_tokens,
            "training": training,
            "lora": lora,
            "trainable_prompt": trainable_prompt,
        }
        prefix, suffix = encode_prompt(decoder_prompt, EMBED_SLOT, tokenizer)
        decoder_config = LensDecoderConfig(
            **common, prompt=decoder_prompt, prefix_ids=prefix, suffix_ids=suffix, injection_layers=injection_layers
        )
        prefix, suffix = encode_prompt(encoder_prompt, TEXT_SLOT, tokenizer)
        encoder_config = LensEncoderConfig(
            **common, prompt=encoder_prompt, prefix_ids=prefix, suffix_ids=suffix, output_layer=output_layer
        )
        config = ConsistencyLensConfig(decoder=decoder_config, encoder=encoder_config)
        decoder = LensDecoder.from_subject(subject, decoder_config)
        lens = cls(config, decoder, LensEncoder.from_subject(subject, encoder_config), subject)
        lens.tokenizer = tokenizer
        return lens

    @classmethod
    def from_artifact_config(cls, config: Any, base_model: Any, base_kwargs: dict[str, Any]) -> Self:
        needs_base = base_model is not None or config.decoder.training != "full" or config.encoder.training != "full"
        if not needs_base:
            decoder = LensDecoder.from_artifact_config(config.decoder, None, base_kwargs)
            return cls(config, decoder, LensEncoder.from_artifact_config(config.encoder, None, base_kwargs))
        subject = load_subject(config, base_model, base_kwargs)
        decoder = LensDecoder.from_subject(subject, config.decoder)
        return cls(config, decoder, LensEncoder.from_subject(subject, config.encoder), subject)

    def trained_tensors(self) -> dict[str, Tensor]:
        parts = {"decoder": self.decoder, "encoder": self.encoder}
        return {f"{name}.{key}": t for name, part in parts.items() for key, t in part.trained_tensors().items()}

    def attach_subject(self, model: PreTrainedModel) -> None:
        """Hands over the subject's model, so that `explain` need not load it; it is frozen."""
        self._subject[:] = [Subject(model, self.config.layer)]

    @property
    def subject(self) -> Subject:
        """The frozen model being read, loaded at its pinned revision when first asked for."""
        if not self._subject:
            model = load_subject(self.config, None, {})
            self.attach_subject(model.to(self.device))  # type: ignore[arg-type]
        return self._subject[0]

    @property
    def mean(self) -> Tensor:
        return self.encoder.normaliser.mean

    @property
    def rms(self) -> Tensor:
        return self.encoder.normaliser.rms

    def set_statistics(self, mean: Tensor, rms: Tensor | float) -> None:
        """Stores the training cache's mean (d,) and RMS in both clones."""
        for normaliser in (self.decoder.normaliser, self.encoder.normaliser):
            normaliser.mean.copy_(torch.as_tensor(mean))
            normaliser.rms.copy_(torch.as_tensor(rms))

    def forward(
        self,
        activations: Tensor,
        text_ids: Tensor | None = None,
        encoder_text_ids: Tensor | None = None,
        noise_keys: Tensor | None = None,
        tau: float = 1.0,
        num_text_tokens: int | None = None,
    ) -> LensOutput:
        """One pass through every trained tensor, on one of two paths.

        Args:
            activations: A, (B, d).
            text_ids: (B, T) tokens to score (teacher forcing); None generates softly.
            encoder_text_ids: (B, T') another text for the encoder to read, with `text_ids` only.
            noise_keys: (B,) int64 sampling keys of the rows for soft generation; None is greedy.
            tau: temperature of the straight-through gradient.
            num_text_tokens: T for soft generation; the configuration's if None.
        """
        if text_ids is not None:
            logits = self.decoder(activations, text_ids)
            read_ids = text_ids if encoder_text_ids is None else encoder_text_ids
            return LensOutput(self.encoder(self.encoder.embed_ids(read_ids)), read_ids, logits)
        length = self.config.num_text_tokens if num_text_tokens is None else num_text_tokens
        text = self.decoder.generate_soft(activations, noise_keys, length, tau)
        reconstruction = self.encoder(self.encoder.embed_text(text, noise_keys, tau))
        return LensOutput(reconstruction, text.token_ids, text.logits)

    def activations(self, text: str) -> Tensor:
        """The activations (S, d) of a text's S tokens at the layer that the lens reads, BOS left out."""
        ids, start = text_ids(self, text)
        input_ids = torch.tensor([ids], device=self.device)
        return self.subject.activations(input_ids, torch.ones_like(input_ids))[0, start:].float()

    @torch.no_grad()
    def decode_ids(
        self,
        activations: Tensor,
        num_text_tokens: int | None = None,
        keys: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """The token ids (B, T) that `decode` turns into strings."""
        length = self.config.num_text_tokens if num_text_tokens is None else num_text_tokens
        with evaluating(self.decoder):  # in train mode gradient checkpointing would cost the cache
            return self.decoder.generate_soft(activations, keys, length, temperature=temperature).token_ids

    @torch.no_grad()
    def decode(
        self,
        activations: Tensor,
        num_text_tokens: int | None = None,
        keys: Tensor | None = None,
        temperature: float = 1.0,
    ) -> DecodedText:
        """Reads activations (B, d) or (d,) as texts: greedy, or sampled with noise `keys` (B,) int64.

        Raises:
            ValueError: if the activations have another shape, or T is less than one.
        """
        activations = torch.atleast_2d(activations).to(self.device)
        if activations.ndim != 2 or len(activations) == 0 or activations.shape[1] != len(self.mean):
            raise ValueError(f"decode: activations must be (B, {len(self.mean)}), got {tuple(activations.shape)}")
        ids = self.decode_ids(activations, num_text_tokens, keys, temperature)
        return DecodedText(ids, self.require_tokenizer().batch_decode(ids))

    @torch.no_grad()
    def encode(self, texts: str | list[str] | Tensor) -> Tensor:
        """Reconstructions (B, d) from texts, or from token ids (B, T).

        Raises:
            ValueError: if there is no text, or an empty one that neither BOS nor prompt precedes.
        """
        if len(texts) == 0 and not isinstance(texts, str):
            raise ValueError("encode: got no texts; pass at least one")
        if isinstance(texts, Tensor):
            return self.encoder(self.encoder.embed_ids(texts.to(self.device)))
        texts = [texts] if isinstance(texts, str) else texts
        tokenizer = self.require_tokenizer()
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        length = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), length, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (tokens, keep) in zip(rows, zip(ids, mask, strict=True), strict=True):
            tokens[length - len(row) :] = torch.tensor(row, dtype=torch.long)
            keep[length - len(row) :] = True
        return self.encoder(self.encoder.embed_ids(ids), mask)

    def explain(self, text: str, positions: list[int] | None = None) -> Explanation:
        """Reads every token of `text` (or the given positions): words, FVE, KL and predictions before and after."""
        return explain_text(self, text, positions)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("tokenizer: this lens has none; set lens.tokenizer to the subject's tokenizer")
        return self.tokenizer

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves the subject along with the lens (`.to`, `.cuda`, ...)."""
        for subject in self._subject:
            subject.model._apply(fn, recurse)
        return super()._apply(fn, recurse)


def num_encoder_blocks(config: LensEncoderConfig, total: int) -> int:
    """How many of the subject's `total` blocks the encoder keeps (see `LensEncoderConfig.output_layer`)."""
    wanted = config.layer + 1 if config.output_layer is None else config.output_layer
    wanted = total if wanted == -1 else wanted
    if not 0 <= wanted <= total:
        raise ValueError(f"output_layer must lie in -1..{total}, got {config.output_layer}")
    return wanted


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts `model` in eval mode, and each of its modules back into the mode that it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def embed_sampled(
    clone: LensDecoder | LensEncoder, logits: Tensor, ids: Tensor, keys: Tensor | None, tau: float
) -> Tensor:
    """Embeddings (N, d) of sampled tokens in a clone's table, straight-through where gradients are wanted."""
    embedding = clone.token_embedding
    if not torch.is_grad_enabled():
        return embedding(ids)
    return straight_through_embedding(logits, ids, keys, embedding.weight, tau) * clone.embedding_scale


@contextmanager
def overwritten_input(block: nn.Module, slot: int, vector: Tensor) -> Iterator[None]:
    """Replaces the input of `block` at index `slot` by `vector` (B, d).

    The block is not checkpointed meanwhile: some versions of transformers (5.17) run the hooks again to recompute a
    block in the backward pass, and this one is gone by then.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        index = torch.full((len(hidden), 1, hidden.shape[-1]), slot, device=hidden.device)
        hidden = hidden.scatter(1, index, vector[:, None].to(hidden.dtype))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    switch: Any = block
    checkpointing = getattr(block, "gradient_checkpointing", False)
    switch.gradient_checkpointing = False
    try:
        yield
    finally:
        switch.gradient_checkpointing = checkpointing
        handle.remove()


for _config_class, _model_class in (
    (LensDecoderConfig, LensDecoder),
    (LensEncoderConfig, LensEncoder),
    (ConsistencyLensConfig, ConsistencyLensModel),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModel.register(_config_class, _model_class, exist_ok=True)
