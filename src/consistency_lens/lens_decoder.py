"""The decoder: activation to text."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .artifact_subject import base_from_config, load_subject
from .cached_passes import CachedPasses, prompt_cache, without_checkpoints
from .configuration_consistency_lens import LensDecoderConfig
from .lens_clone import LensClone, Normaliser, clone_subject, embed_sampled
from .residual_stream import ResidualStream
from .straight_through import fold_in, sample_tokens


class SoftText(NamedTuple):
    """A generated text: `token_ids` (B, T); `logits` (B, T, V), those that each token was drawn from."""

    token_ids: Tensor
    logits: Tensor


class LensDecoder(LensClone):
    """Activation to text: the subject's clone, prompted with a projection of the activation."""

    config_class = LensDecoderConfig
    artifact_kind = "Decoder of a consistency lens (activation to text)"

    def __init__(self, config: LensDecoderConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base if base is not None else base_from_config(config.base_config))
        stream = self.residual_stream()
        self.embedding_scale = stream.embedding_scale
        if not 0 <= config.injection_layers < stream.num_layers:
            raise ValueError(f"injection_layers must lie in 0..{stream.num_layers - 1}, got {config.injection_layers}")
        device, width = stream.input_embedding.get_parameter("weight").device, stream.width
        self.normaliser = Normaliser(width, device)
        self.projection = nn.Linear(width, width, device=device)
        self.injections = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(config.injection_layers))
        self.add_prompt_parameters()
        self.post_init()

    def residual_stream(self) -> ResidualStream:
        """The stream of this clone, by the paths of the configuration where it names any."""
        return ResidualStream(self.base, blocks=self.config.blocks, final_norm=self.config.final_norm)

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
                # a compiled base would leave out hooks that were not there when it was compiled
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
                normalised = self.normaliser.normalise(activations).to(self.projection.weight.dtype)
                for block, projection in zip(self.residual_stream().blocks[1:], self.injections, strict=False):
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
            use_cache: False runs the whole sequence anew at every step, the reference for tests.

        Raises:
            ValueError: if T is less than one.
        """
        tokens = self.generated_tokens(activations, keys, num_text_tokens, tau, temperature, use_cache)
        ids, logits = zip(*tokens, strict=True)
        return SoftText(torch.stack(ids, dim=1), torch.stack(logits, dim=1))

    @torch.no_grad()
    def generate_ids(
        self, activations: Tensor, keys: Tensor | None, num_text_tokens: int, temperature: float = 1.0
    ) -> Tensor:
        """The token ids (B, T) of `generate_soft`, without keeping T x V logits a row."""
        tokens = self.generated_tokens(activations, keys, num_text_tokens, temperature=temperature)
        return torch.stack([ids for ids, _ in tokens], dim=1)

    def generated_tokens(
        self,
        activations: Tensor,
        keys: Tensor | None,
        num_text_tokens: int,
        tau: float = 1.0,
        temperature: float = 1.0,
        use_cache: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The text token by token: ids (B,) and the logits (B, V) that they were drawn from; see `generate_soft`."""
        if num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {num_text_tokens}; 8 is a good start")
        dtype = self.token_embedding.weight.dtype
        batch = len(activations)
        prefix, suffix = (piece.to(dtype) for piece in self.prompt())
        chunk = torch.cat([self.slot_embedding(activations).to(dtype), suffix.expand(batch, -1, -1)], dim=1)
        if use_cache:
            recompute = self.checkpoints_gradients() and torch.is_grad_enabled()
            before = prompt_cache(self.base.get_decoder(), prefix, batch)
            chunk, slot = chunk + 0 * before.end, 0
            passes = CachedPasses(self.base, before.cache, recompute)
        else:
            chunk, slot = torch.cat([prefix.expand(batch, -1, -1), chunk], dim=1), len(prefix)

        @contextmanager
        def injected() -> Iterator[None]:
            with without_checkpoints(self.base), self.injected(activations, slot):
                yield

        for step in range(num_text_tokens):
            if use_cache:
                logits = passes(chunk, injected if step == 0 else partial(without_checkpoints, self.base))
            else:
                with self.injected(activations, slot):
                    logits = self.base(inputs_embeds=chunk, use_cache=False, logits_to_keep=1).logits[:, -1]
            step_keys = None if keys is None else fold_in(keys, step)
            ids = sample_tokens(logits, step_keys, temperature)
            yield ids, logits
            if step < num_text_tokens - 1:
                token = embed_sampled(self, logits, ids, step_keys, tau)[:, None].to(dtype)
                chunk = token if use_cache else torch.cat([chunk, token], dim=1)

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
