"""The tuned lens: one affine translator for each layer but the last, decoded by the subject's own head.

Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens". Here translators come after
the final norm, and each layer's logits are divided by a temperature.
Shapes: B batch, S tokens, d width, V vocabulary, L layers. Layer k is the output of block k, counted from 0.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..artifact_subject import load_subject, load_subject_tokenizer, subject_location
from ..context_length import context_length
from ..lens_artifact import TrainedTensorsModel
from ..residual_stream import ResidualStream
from ..turns import in_turn
from .configuration_tuned_lens import TunedLensConfig
from .preconditioner import Preconditioner
from .readout import Readout
from .streamed_kl import Head, Teacher, streamed_kl
from .translator import TunedTranslator

SEED = 316


class Trajectory(NamedTuple):
    """What both lenses read at every layer and token of a text."""

    input_ids: Tensor
    """(S,)."""
    tokens: list[str]
    """The S tokens as text."""
    tuned: Tensor
    """log p(next token) of the tuned lens, (L, S, V) float32; the last layer is the model itself."""
    norm: Tensor
    """The same of the norm lens."""
    top_tokens: list[list[str]]
    """The tuned lens's most probable next token, L lists of S."""

    @property
    def kl_from_final(self) -> Tensor:
        """KL(P_final || P_layer) of the tuned lens in nats, (L, S)."""
        final = self.tuned[-1]
        return (final.exp() * (final - self.tuned)).sum(dim=-1)

    @property
    def norm_kl_from_final(self) -> Tensor:
        """The same of the norm lens."""
        final = self.norm[-1]
        return (final.exp() * (final - self.norm)).sum(dim=-1)


@dataclass
class FitOutput(ModelOutput):
    """What one pass of the fit gives.

    Attributes:
        kl: KL(P_final || P_layer) in nats, (layers, N).
        smallness: mean over the layers of the sum of squares of U, V (or W) and c.
        roughness: mean over the layers of the squared distance of their maps from those of the layers beside them.
    """

    kl: Tensor | None = None
    smallness: Tensor | None = None
    roughness: Tensor | None = None


class TunedLens(TrainedTensorsModel):
    """Translators, temperatures and basis of a tuned lens; the subject that it reads is kept outside the module tree.

    A lens may lie on the CPU while its subject is elsewhere: the translator of a layer goes to the residual when that
    layer is read, one at a time, so translators of a very large model need no room on its device.

    Attributes:
        translators: L - 1 of them; the last layer is the identity.
        norm_temperature: (L,), the temperatures that calibrate the norm lens best; 1 until they are fitted.
    """

    config_class = TunedLensConfig
    artifact_kind = "Tuned lens"
    norm_temperature: Tensor

    def __init__(self, config: TunedLensConfig, subject_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.translators = nn.ModuleList(
            TunedTranslator(config.width, config.rank, config.learn_temperature) for _ in range(config.num_layers - 1)
        )
        self.preconditioner = (
            None
            if config.preconditioner == "none"
            else Preconditioner(config.width, rotated=config.preconditioner == "prism")
        )
        self.register_buffer("norm_temperature", torch.ones(config.num_layers))
        self._subject: list[ResidualStream] = []  # a list hides it from nn.Module: no saving, no wrapping
        self._readout: list[Readout] = []
        if subject_model is not None:
            self.attach_subject(subject_model)
        self.post_init()

    @classmethod
    def for_model(
        cls,
        subject: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        rank: int | None = None,
        learn_temperature: bool = True,
        preconditioner: str = "none",
        translator_place: str = "after_norm",
        revision: str | None = None,
        blocks: str | None = None,
        final_norm: str | None = None,
        seed: int = SEED,
    ) -> Self:
        """A new lens of a subject, close to the norm lens.

        Args:
            subject: a causal language model; it is frozen and put in evaluation mode.
            revision: the commit that it was loaded at.
            seed: of the translators' first values.

        For the other arguments see `TunedLensConfig`.

        Raises:
            ValueError: for a subject without a head, one of a single layer, or a rank above its width.
        """
        readout = Readout(subject.requires_grad_(False).eval(), blocks, final_norm)
        num_layers = ResidualStream(subject, blocks, final_norm).num_layers
        if num_layers < 2:
            raise ValueError("model: it has one block, whose output a tuned lens leaves as it is; take a deeper model")
        config = TunedLensConfig(
            base_model_name_or_path=subject.config.name_or_path or "",
            base_model_revision=revision,
            base_config=subject.config.to_dict(),
            width=readout.width if translator_place == "before_norm" else readout.weight.shape[1],
            num_layers=num_layers,
            vocab_size=readout.vocab_size,
            rank=rank,
            learn_temperature=learn_temperature,
            preconditioner=preconditioner,
            translator_place=translator_place,
            blocks=blocks,
            final_norm=final_norm,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lens = cls(config)
        lens._take(subject, readout)
        lens.tokenizer = tokenizer
        return lens.eval()

    # --- the artifact

    @classmethod
    def from_artifact_config(cls, config: Any, base_model: Any, base_kwargs: dict[str, Any]) -> Self:
        return cls(config, None if base_model is None else load_subject(config, base_model, base_kwargs))

    def trained_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """A lens reads residuals: it has no token embedding of its own."""

    # --- the subject

    def attach_subject(self, model: PreTrainedModel) -> None:
        """Hands over the subject, so that it need not be loaded; it is frozen.

        Raises:
            ValueError: if its sizes are not those that the lens was made for, or it has no head.
        """
        model = model.requires_grad_(False).eval()
        self._take(model, Readout(model, self.config.blocks, self.config.final_norm))

    def _take(self, model: PreTrainedModel, readout: Readout) -> None:
        stream = ResidualStream(model, self.config.blocks, self.config.final_norm)
        before_norm = self.config.translator_place == "before_norm"
        found = {
            "width": readout.width if before_norm else readout.weight.shape[1],
            "num_layers": stream.num_layers,
            "vocab_size": readout.vocab_size,
        }
        for name, value in found.items():
            if value != getattr(self.config, name):
                raise ValueError(
                    f"subject: {name} is {value}, the lens was made for {getattr(self.config, name)}; pass its own "
                    "subject as base_model"
                )
        self._subject[:], self._readout[:] = [stream], [readout]

    @property
    def stream(self) -> ResidualStream:
        """The residual stream of the subject, which is loaded at its pinned revision when first asked for."""
        if not self._subject:
            self.attach_subject(load_subject(self.config, None, self.base_kwargs))
        return self._subject[0]

    @property
    def subject_model(self) -> PreTrainedModel:
        """The subject, frozen."""
        return self.stream.model

    @property
    def readout(self) -> Readout:
        """The subject's final norm and head, in float32."""
        assert self.stream  # loads it
        return self._readout[0]

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; where the lens came without one, as a published lens does, that of its pinned model.

        Raises:
            ValueError: if it cannot be loaded either.
        """
        if self.tokenizer is None and subject_location(self.config):
            self.tokenizer = load_subject_tokenizer(self.config, self.base_kwargs)
        return super().require_tokenizer()

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves the subject along with the lens (`.to`, `.cuda`, ...), unless it is spread over devices."""
        for stream in self._subject:
            if len(getattr(stream.model, "hf_device_map", {})) > 1:
                continue
            stream.model._apply(fn, recurse)
            self._readout[:] = [Readout(stream.model, self.config.blocks, self.config.final_norm)]
        return super()._apply(fn, recurse)

    @property
    def is_calibrated(self) -> bool:
        """Whether the norm lens's own temperatures were fitted; lenses that others have published have none."""
        return bool((self.norm_temperature != 1).any())

    # --- the fit

    def forward(self, hidden: Tensor, layers: Sequence[int], teacher: Teacher, head: Head) -> FitOutput:
        """The loss of some layers; every trained tensor is used in here, so DDP reduces every gradient.

        Args:
            hidden: (layers, N, d) float32, see `ResidualBatch`.
            layers: which they are, ascending, without the last one.
            teacher: of the same N rows.
            head: of the subject.
        """
        translated = torch.stack([self.translate(layer, rows) for layer, rows in zip(layers, hidden, strict=True)])
        temperature = torch.stack([self.temperature(layer) for layer in layers]).to(translated)
        used: Any = [self.translators[layer] for layer in layers]
        apart = [self._roughness(layer) for layer in layers]
        return FitOutput(
            kl=streamed_kl(translated, temperature, teacher, head),
            smallness=torch.stack([translator.smallness() for translator in used]).mean(),
            roughness=torch.stack(apart).mean(),
        )

    def _roughness(self, layer: int) -> Tensor:
        """The squared distances of a layer's map from its neighbours', which are constants here.

        So each layer has the gradient of the sum over all pairs, and no layer moves that is not in the step.
        """
        one: Any = self.translators[layer]
        beside: Any = [self.translators[k] for k in (layer - 1, layer + 1) if 0 <= k < len(self.translators)]
        return sum((one.distance(other) for other in beside), start=torch.zeros_like(one.c.sum()))

    # --- reading

    @torch.no_grad()
    def residuals(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Outputs of all blocks, (L, B, S, d), on the readout's device; the head does not run.

        Args:
            input_ids: right-padded tokens, (B, S) int64.
            attention_mask: 1 for real tokens, (B, S); None where all are.
        """
        found = self.block_outputs(input_ids, range(self.num_layers), attention_mask)
        return torch.stack([residual.to(self.readout.device) for residual in found])

    @torch.no_grad()
    def block_outputs(
        self, input_ids: Tensor, layers: Sequence[int], attention_mask: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs (B, S, d) of some blocks, each where its block lies; no block above the last of them runs."""
        device = self.stream.input_embedding.get_parameter("weight").device
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate takes the tokens on
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with in_turn(self.stream.model), ExitStack() as stack:
            captures = [stack.enter_context(self.stream.capture(layer, stop=layer == max(layers))) for layer in layers]
            self.subject_model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False)
        return [capture.activations for capture in captures]

    def translate(self, layer: int, hidden: Tensor) -> Tensor:
        """What the head decodes of layer k, before the temperature: (..., d) to (..., d').

        Args:
            hidden: residuals after the final norm; raw ones where the translators come before it.
        """
        if layer < self.num_layers - 1:
            translator = self.translators[layer]
            if self.preconditioner is None:
                hidden = translator(hidden)
            else:
                hidden = self.preconditioner.inverse(translator(self.preconditioner(hidden)))
        return self.readout.normalise(hidden) if self.config.translator_place == "before_norm" else hidden

    def logits(self, layer: int, residual: Tensor) -> Tensor:
        """The tuned lens: logits (..., V) float32 of residuals (..., d) of layer k; the model's own for the last.

        Raises:
            ValueError: if there is no such layer, or the residuals are of another width.
        """
        self._check(layer, residual)
        if self.config.translator_place == "before_norm":
            hidden = residual.to(self.readout.device, torch.float32)
        else:
            hidden = self.readout.normalise(residual)
        logits = self.readout.logits(self.translate(layer, hidden))
        return logits / self.temperature(layer).to(logits.device)

    def temperature(self, layer: int) -> Tensor:
        """The temperature of layer k, (); 1 for the last."""
        if layer == self.num_layers - 1:
            return torch.ones(())
        translator: Any = self.translators[layer]
        return translator.tau

    def logit_lens(self, layer: int, residual: Tensor, calibrated: bool = False) -> Tensor:
        """The norm lens (logit lens): logits (..., V) float32 of residuals (..., d), by final norm and head alone.

        Args:
            calibrated: divide them by the norm lens's own temperature of that layer, for a comparison that shows
                what the translator does beyond calibration.

        Raises:
            ValueError: if there is no such layer, or the residuals are of another width.
        """
        self._check(layer, residual)
        logits = self.readout.logits(self.readout.normalise(residual))
        return logits / self.norm_temperature[layer].to(logits.device) if calibrated else logits

    @torch.no_grad()
    def trajectory(self, text: str | Tensor) -> Trajectory:
        """What both lenses read at every layer and token of a text.

        Args:
            text: a text, or its tokens (S,) int64.

        Raises:
            ValueError: if the lens has no tokenizer, or the text no tokens or more than the model reads.
        """
        tokenizer = self.require_tokenizer()
        ids = text if isinstance(text, Tensor) else torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
        if ids.numel() == 0:
            raise ValueError("text: it has no tokens; pass some text")
        most = context_length(self.subject_model.config)
        if most is not None and ids.numel() > most:
            raise ValueError(f"text: it has {ids.numel()} tokens, the model reads {most}; pass a shorter one")
        residuals = self.residuals(ids[None])[:, 0]
        layers = range(self.num_layers)
        tuned = torch.stack([self.logits(layer, residuals[layer]).log_softmax(dim=-1) for layer in layers])
        norm = torch.stack([self.logit_lens(layer, residuals[layer]).log_softmax(dim=-1) for layer in layers])
        tokens, *top = (tokenizer.batch_decode(row[:, None]) for row in (ids, *tuned.argmax(dim=-1)))
        return Trajectory(ids, tokens, tuned, norm, top)

    def _check(self, layer: int, residual: Tensor) -> None:
        self.stream.check_layer(layer)
        if residual.shape[-1] != self.stream.width:
            raise ValueError(
                f"residual: its last dimension is {residual.shape[-1]}, the subject's width is {self.stream.width}; "
                "pass outputs of its blocks"
            )
