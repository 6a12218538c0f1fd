"""The lens: a decoder and an encoder joined, and the subject that both are judged by.

Every tensor is used inside `ConsistencyLensModel.forward`, so DDP, FSDP and DeepSpeed see every gradient, and a lens
whose weights are spread over processes gathers them for every use. The soft path (`noise_keys`) generates a text with
straight-through gradients, the teacher-forced path (`text_ids`) scores a given one; both reconstruct from the text,
and `decode_ids` and `read_ids` take one half of the way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .artifact_subject import load_subject
from .cached_passes import evaluating
from .configuration_consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig
from .explanation import Explanation, explain_text, text_ids
from .lens_artifact import TrainedTensorsModel
from .lens_clone import encode_prompt
from .lens_decoder import LensDecoder, SoftText
from .lens_encoder import LensEncoder
from .residual_stream import ResidualStream
from .spans import span
from .steering import Steering, steer_text, text_direction
from .subject import Subject
from .token_logits import RowReader
from .turns import in_turn

# activations (B, d) and text ids (B, T) -> what reads the logits of the B * T tokens, row by row
TokenReader = Callable[[Tensor, Tensor], RowReader]

EMBED_SLOT = "<embed>"
TEXT_SLOT = "<text>"


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
        logits: (B, T, V) the decoder's logits for each token of its text; None where a reader has read them.
        token_values: name -> what the reader has made of the logits, (B, T); of fewer texts if it left some out.
    """

    reconstruction: Tensor | None = None
    text_ids: Tensor | None = None
    logits: Tensor | None = None
    token_values: dict[str, Tensor] | None = None


class ConsistencyLensModel(TrainedTensorsModel):
    """Decoder and encoder, and the subject that judges both (kept outside the module tree: it is never trained)."""

    config_class = ConsistencyLensConfig
    artifact_kind = "Consistency lens"

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
        stop_token_id: int | None = None,
        output_layer: int | None = None,
        revision: str | None = None,
        blocks: str | None = None,
        final_norm: str | None = None,
    ) -> Self:
        """A new lens for `subject` at `layer`; see the configurations for the arguments.

        Raises:
            ValueError: for a layer out of range, T < 1, a prompt without its slot, an unknown training mode.
        """
        ResidualStream(subject, blocks=blocks, final_norm=final_norm).check_layer(layer)
        common = {
            "base_model_name_or_path": subject.config.name_or_path,
            "base_model_revision": revision,
            "base_config": subject.config.to_dict(),
            "layer": layer,
            "num_text_tokens": num_text_tokens,
            "training": training,
            "lora": lora,
            "trainable_prompt": trainable_prompt,
            "blocks": blocks,
            "final_norm": final_norm,
        }
        prefix, suffix = encode_prompt(decoder_prompt, EMBED_SLOT, tokenizer)
        decoder_config = LensDecoderConfig(
            **common,
            prompt=decoder_prompt,
            prefix_ids=prefix,
            suffix_ids=suffix,
            injection_layers=injection_layers,
            stop_token_id=stop_token_id,
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

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """A lens reads activations: it has no token embedding of its own (accelerate would shard that apart)."""

    def trained_tensors(self) -> dict[str, Tensor]:
        parts = {"decoder": self.decoder, "encoder": self.encoder}
        return {f"{name}.{key}": t for name, part in parts.items() for key, t in part.trained_tensors().items()}

    def attach_subject(self, model: PreTrainedModel) -> None:
        """Hands over the subject's model, so that `explain` need not load it; it is frozen."""
        paths = {"blocks": self.config.decoder.blocks, "final_norm": self.config.decoder.final_norm}
        self._subject[:] = [Subject(model, self.config.layer, **paths)]

    @property
    def subject(self) -> Subject:
        """The frozen model being read, loaded at its pinned revision when first asked for."""
        with in_turn(self):  # one is loaded, however many threads ask for it
            if not self._subject:
                model = load_subject(self.config, None, self.base_kwargs)
                self.attach_subject(model.to(self.device))  # type: ignore[arg-type]
            return self._subject[0]

    @property
    def mean(self) -> Tensor:
        """Mean of the training activations, (d,)."""
        return self.encoder.normaliser.mean

    @property
    def rms(self) -> Tensor:
        """Root mean square of the centred training activations, ()."""
        return self.encoder.normaliser.rms

    def set_statistics(self, mean: Tensor, rms: Tensor | float) -> None:
        """Stores the training cache's mean (d,) and RMS in both clones.

        Raises:
            ValueError: if the RMS is not a positive number: activations that never vary cannot be normalised.
        """
        if not 0 < float(rms) < float("inf"):
            raise ValueError(f"statistics: RMS must be positive and finite, got {float(rms)}; check the activations")
        for normaliser in (self.decoder.normaliser, self.encoder.normaliser):
            normaliser.mean.copy_(torch.as_tensor(mean))
            normaliser.rms.copy_(torch.as_tensor(rms))

    def forward(
        self,
        activations: Tensor | None = None,
        text_ids: Tensor | None = None,
        encoder_text_ids: Tensor | None = None,
        encoder_text_mask: Tensor | None = None,
        noise_keys: Tensor | None = None,
        tau: float = 1.0,
        num_text_tokens: int | None = None,
        straight_through: bool = False,
        sample: bool = False,
        temperature: float = 1.0,
        reader: TokenReader | None = None,
        chunk_size: int = 0,
    ) -> LensOutput:
        """One pass through every trained tensor, on one of two paths; or, without gradients, half of the way.

        Args:
            activations: A, (B, d). None only reads `text_ids` with the encoder.
            text_ids: (B, T) tokens to score (teacher forcing); None generates softly.
            encoder_text_ids: (B, T') another text for the encoder to read, with `text_ids` only.
            encoder_text_mask: (B, T') bool, what the encoder reads of that text or of `text_ids`; None: `text_mask`.
            noise_keys: (B,) int64 sampling keys of the rows for soft generation; None is greedy.
            tau: temperature of the straight-through gradient.
            straight_through: with `text_ids` that the encoder reads itself, lets the reconstruction's gradient pass
                through the embedding of each token into the logits that the token was drawn from.
            num_text_tokens: T for generation; the configuration's if None.
            sample: only draws a text, at `temperature`, and gives its `text_ids`; no gradient.
            reader: reads the logits of the decoder's text in place of the caller, who gets `token_values`.
            chunk_size: with a reader or `sample`, rows of logits held at a time (`token_logits`); 0 holds all of them.
        """
        length = self.config.num_text_tokens if num_text_tokens is None else num_text_tokens
        if activations is None:
            if text_ids is None:
                raise ValueError("forward: got neither activations nor text_ids; pass activations, (B, d)")
            return LensOutput(self.reconstruct(text_ids, encoder_text_mask), text_ids)
        if sample:
            with span("generation"):
                ids = self.decoder.generate_ids(activations, noise_keys, length, temperature, chunk_size)
            return LensOutput(text_ids=ids)
        if text_ids is not None:
            with span("decoder"):
                text = self.decoder.score(activations, text_ids, chunk_size)
        else:
            with span("generation"):
                text = self.decoder.generate_soft(
                    activations, noise_keys, length, tau, chunk_size=chunk_size, reader=self.encoder
                )
        embed_tau = tau if straight_through and text_ids is not None else None
        values, embeddings = self.read_tokens(activations, text, noise_keys, embed_tau, reader)
        embeddings = text.embeddings if embeddings is None else embeddings
        logits = text.logits if reader is None else None
        if embeddings is not None:
            with span("encoder"):
                mask = self.mask_to_read(text.token_ids, encoder_text_mask)
                return LensOutput(self.encoder(embeddings, mask), text.token_ids, logits, values)
        read_ids = text.token_ids if encoder_text_ids is None else encoder_text_ids
        return LensOutput(self.reconstruct(read_ids, encoder_text_mask), read_ids, logits, values)

    def read_tokens(
        self, activations: Tensor, text: SoftText, keys: Tensor | None, tau: float | None, reader: TokenReader | None
    ) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """All that is read of a text's logits, at once, for they may be made for it: what `reader` makes of them, and,
        with `tau`, the embeddings (B, T, d) that the encoder reads."""
        read_rows = None if reader is None else reader(activations, text.token_ids)
        embed = None if tau is None else self.encoder.row_embedder(text.token_ids, keys, tau)

        def read(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            found = {} if read_rows is None else read_rows(logits, rows)
            if embed is not None:
                with span("encoder"):
                    found["embeddings"] = embed(logits, rows)
            return found

        if read_rows is None and embed is None:
            return None, None
        length = text.token_ids.shape[1]
        found = {name: rows.unflatten(0, (-1, length)) for name, rows in text.predictions.read(read).items()}
        embeddings = found.pop("embeddings", None)
        return (None if reader is None else found), embeddings

    def text_mask(self, text_ids: Tensor) -> Tensor:
        """What of the texts (B, T) is text, (B, T) bool: all before the decoder's stop token, if it has one.

        The first token always counts: an encoder without BOS and prompt could not read an empty text.
        """
        mask = self.drawn_mask(text_ids) & (text_ids != self.stop_token_id)
        mask[:, :1] = True
        return mask

    def drawn_mask(self, text_ids: Tensor) -> Tensor:
        """What of the texts (B, T) the decoder drew before it stopped, (B, T) bool: the stop token is the last."""
        stops = text_ids == self.stop_token_id
        return stops.cumsum(dim=1) - stops.long() == 0

    @property
    def stop_token_id(self) -> int:
        """The token that ends a text; -1, which is no token, where texts always have T tokens."""
        stop = self.config.decoder.stop_token_id
        return -1 if stop is None else stop

    def read_ids(self, text_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the encoder makes of texts (B, T): Â, (B, d). `mask` (B, T) says what is read; `text_mask` if None."""
        return cast(Tensor, self(text_ids=text_ids, encoder_text_mask=mask).reconstruction)

    def reconstruct(self, text_ids: Tensor, mask: Tensor | None) -> Tensor:
        """What `read_ids` returns, from inside `forward`."""
        with span("encoder"):
            return self.encoder(self.encoder.embed_ids(text_ids), self.mask_to_read(text_ids, mask))

    def mask_to_read(self, text_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """The given mask, or the text's own; None where all of it is read, which spares the encoder a look."""
        return self.text_mask(text_ids) if mask is None and self.stop_token_id >= 0 else mask

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
        chunk_size: int = 0,
    ) -> Tensor:
        """The token ids (B, T) that `decode` turns into strings; `chunk_size`: rows of logits held at a time."""
        settings = {"num_text_tokens": num_text_tokens, "noise_keys": keys, "temperature": temperature}
        with in_turn(self.decoder), evaluating(self.decoder):  # gradient checkpointing would cost the cache
            return cast(Tensor, self(activations, sample=True, chunk_size=chunk_size, **settings).text_ids)

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
        return self.decoded(self.decode_ids(activations, num_text_tokens, keys, temperature))

    def decoded(self, text_ids: Tensor) -> DecodedText:
        """Token ids (B, T) of the decoder, and the texts that they are, each up to its stop token."""
        rows = [row[keep] for row, keep in zip(text_ids, self.text_mask(text_ids), strict=True)]
        return DecodedText(text_ids, self.require_tokenizer().batch_decode(rows))

    @torch.no_grad()
    def encode(self, texts: str | list[str] | Tensor) -> Tensor:
        """Reconstructions (B, d) from texts, or from token ids (B, T).

        Raises:
            ValueError: if there is no text, or an empty one that neither BOS nor prompt precedes.
        """
        if isinstance(texts, Tensor):
            return self.read_ids(texts.to(self.device))
        texts = [texts] if isinstance(texts, str) else texts
        tokenizer = self.require_tokenizer()
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        length = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), length, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (tokens, keep) in zip(rows, zip(ids, mask, strict=True), strict=True):
            tokens[length - len(row) :] = torch.tensor(row, dtype=torch.long)
            keep[length - len(row) :] = True
        return self.read_ids(ids, mask)

    def explain(self, text: str, positions: list[int] | None = None) -> Explanation:
        """Reads every token of `text` (or the given positions): words, FVE, KL and predictions before and after."""
        return explain_text(self, text, positions)

    def direction(self, original: str, edited: str) -> Tensor:
        """What an edit of the words changes in the reconstruction: E(edited) - E(original), (d,) float32.

        Raises:
            ValueError: if a text is empty and neither BOS nor prompt precedes it.
        """
        return text_direction(self, original, edited)

    def steer(self, prompt: str, edit: str | Callable[[str], str], position: int = -1, scale: float = 1.0) -> Steering:
        """Edits the words for one token's activation and lets the subject go on: its predictions before and after.

        `lens.steer("The cat sat", lambda words: words.replace("cat", "dog"))` puts A + scale * (E(edited) - E(words))
        in the place of A; `edit` may also be the whole edited text.

        Raises:
            ValueError: see `steering.steer_text`.
        """
        return steer_text(self, prompt, edit, position, scale)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves the subject along with the lens (`.to`, `.cuda`, ...)."""
        for subject in self._subject:
            subject.model._apply(fn, recurse)
        return super()._apply(fn, recurse)
