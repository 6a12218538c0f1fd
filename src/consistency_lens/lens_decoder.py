"""The decoder: activation to text."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .artifact_subject import base_from_config, load_subject
from .cached_passes import CachedPasses, Pass, checkpointed_modules, not_checkpointed, prompt_cache
from .configuration_consistency_lens import LensDecoderConfig
from .lens_clone import LensClone, Normaliser, clone_subject, embed_sampled
from .residual_stream import ResidualStream, headless
from .straight_through import fold_in, room_for_noise, sample_tokens
from .summed_gradient import SummedGradient, can_be_summed
from .text_attention import TextPasses, can_attend
from .token_logits import TokenLogits, head_logits
from .turns import in_turn

NO_ACTIVATIONS = "decode: got no activations; pass at least one"
# Tokens of a prompt from which on a pass of its own takes less time than its tokens in each row do.
LONG_PROMPT = 4


class SoftText(NamedTuple):
    """A text.

    Attributes:
        token_ids: (B, T).
        predictions: what each of its B * T tokens was drawn from.
        embeddings: (B, T, d) in the table of the clone that is to read it, if any.
    """

    token_ids: Tensor
    predictions: TokenLogits
    embeddings: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The logits of all tokens, (B, T, V)."""
        return self.predictions.of_rows(slice(None)).unflatten(0, self.token_ids.shape)


class LensDecoder(LensClone):
    """Activation to text: the subject's clone, prompted with a projection of the activation.

    Several threads may run it at once, each `in_turn`; but not a backward pass in which checkpoints run again.
    """

    config_class = LensDecoderConfig
    artifact_kind = "Decoder of a consistency lens (activation to text)"
    sums_gradients = True
    """Whether the steps of a text share one gradient of the unembedding, and one of each table that embeds them."""
    attends_in_place: bool | None = None
    """Whether they share one buffer of keys and values, in training and where the architecture allows it; None: on a
    CPU, for nowhere else has it been measured."""
    keeps_noise = True
    """Whether a draw keeps its noise for the backward pass, where that takes no more memory."""

    def __init__(self, config: LensDecoderConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base if base is not None else base_from_config(config.base_config))
        stream = self.residual_stream()
        self.embedding_scale = stream.embedding_scale
        if not 0 <= config.injection_layers < stream.num_layers:
            raise ValueError(f"injection_layers must lie in 0..{stream.num_layers - 1}, got {config.injection_layers}")
        device, width = stream.input_embedding.get_parameter("weight").device, stream.width
        self.normaliser = Normaliser(width, device)
        self.projection = nn.Linear(width, self.token_embedding.embedding_dim, device=device)
        self.injections = nn.ModuleList(nn.Linear(width, width, device=device) for _ in range(config.injection_layers))
        self.add_prompt_parameters()
        self.post_init()

    def residual_stream(self) -> ResidualStream:
        """The stream of this clone, by the paths of the configuration where it names any."""
        return ResidualStream(self.base, blocks=self.config.blocks, final_norm=self.config.final_norm)

    def start_projections(self) -> None:
        """Scaled identity: a mean activation enters the slot with the norm of a mean token embedding.

        Where embeddings are narrower than the stream (OPT-350M), what is widened to the activation, or nearly so.
        """
        table = self.token_embedding.weight
        norm = table.float().norm(dim=1).mean() * self.embedding_scale
        with torch.no_grad():
            for projection in [self.projection, *self.injections]:
                narrow, width = projection.weight.shape
                start = torch.eye(width, device=norm.device)
                if narrow != width:
                    start = self.residual_stream().narrowing(narrow)
                    start *= width**0.5 / start.norm()
                projection.weight.copy_(start * (norm / width**0.5))
                projection.bias.zero_()

    def slot_embedding(self, activations: Tensor) -> Tensor:
        """What the slot holds: proj(normalise(A)), (B, 1, d)."""
        return self.projection(self.normaliser.normalise(activations).to(self.projection.weight.dtype))[:, None]

    def filled_prompt(self, activations: Tensor) -> Tensor:
        """Embeddings of the whole prompt, its slot filled: (B, P + 1 + Q, d), as the base reads them."""
        prefix, suffix = (part.expand(len(activations), -1, -1) for part in self.prompt())
        pieces = [prefix, self.slot_embedding(activations), suffix]
        return torch.cat([piece.to(self.token_embedding.weight.dtype) for piece in pieces], dim=1)

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

    def forward(
        self,
        activations: Tensor | None = None,
        text_ids: Tensor | None = None,
        with_head: bool = True,
        states: Tensor | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Teacher forcing: logits (B, T, V) of the tokens `text_ids` (B, T), given A (B, d) and the tokens before.

        In two halves it is `with_head=False`, which gives the hidden states (B, T, d) before the head, and then
        `states` (n, d), any of these rows, of which the head makes logits (n, V). Without `use_cache` a long prompt
        before the slot runs once a row, and not once; the reference for tests.

        Raises:
            ValueError: if activations or texts are missing, or there are none of them.
        """
        if states is not None:
            with in_turn(self):
                return head_logits(self.base, states)
        if activations is None or text_ids is None:
            raise ValueError("forward: needs both activations (B, d) and text_ids (B, T), or states (n, d) alone")
        if len(activations) == 0:
            raise ValueError(NO_ACTIVATIONS)
        with in_turn(self):
            return self.forced(activations, text_ids, with_head, use_cache)

    def forced(self, activations: Tensor, text_ids: Tensor, with_head: bool, use_cache: bool) -> Tensor:
        """The first half of `forward`, or both."""
        prompt, slot, cache = self.filled_prompt(activations), len(self.config.prefix_ids), None
        inputs = torch.cat([prompt, self.token_embedding(text_ids[:, :-1]).to(prompt.dtype)], dim=1)
        if use_cache and slot >= LONG_PROMPT and not self.checkpoints_gradients() and self.may_cache:
            before = prompt_cache(headless(self.base), prompt[0, :slot], len(inputs))
            inputs, cache, slot = inputs[:, slot:] + before.nothing, before.cache, 0
        with self.injected(activations, slot):
            return self.last_outputs(inputs, text_ids.shape[1], with_head, cache)

    def last_outputs(self, inputs: Tensor, count: int, with_head: bool, cache: DynamicCache | None = None) -> Tensor:
        """What the base makes of the last `count` embeddings: logits (B, count, V), or the hidden states before."""
        settings = {"inputs_embeds": inputs, "past_key_values": cache, "use_cache": cache is not None}
        if with_head:
            return self.base(**settings, logits_to_keep=count).logits
        return headless(self.base)(**settings).last_hidden_state[:, -count:]

    def head(self, states: Tensor) -> Tensor:
        """Logits (n, V) of hidden states (n, d), through this module's own call, which may have to gather weights."""
        return self(states=states)

    def predictions(self, states: Tensor, chunk_size: int) -> TokenLogits:
        """Logits (..., V) if `chunk_size` is 0, else last hidden states (..., d), as the logits of tokens."""
        return TokenLogits.of(states, self.head, chunk_size)

    def score(self, activations: Tensor, text_ids: Tensor, chunk_size: int = 0) -> SoftText:
        """A given text (B, T) with the predictions of its tokens, as `forward` makes them."""
        states = self(activations, text_ids, with_head=chunk_size == 0)
        return SoftText(text_ids, self.predictions(states, chunk_size))

    def generate_soft(
        self,
        activations: Tensor,
        keys: Tensor | None,
        num_text_tokens: int,
        tau: float = 1.0,
        temperature: float = 1.0,
        use_cache: bool = True,
        chunk_size: int = 0,
        reader: LensClone | None = None,
    ) -> SoftText:
        """Generates T tokens, each drawn by Gumbel-max, with straight-through gradients through all steps.

        Args:
            activations: A, (B, d).
            keys: (B,) int64 noise keys of the rows (`straight_through.row_keys`); None for greedy text.
            num_text_tokens: T.
            tau: temperature of the relaxed gradient; it never changes the sample.
            temperature: temperature of the sample.
            use_cache: False runs the whole sequence anew at every step, the reference for tests.
            chunk_size: rows of logits held at a time (`token_logits`); 0 holds all of them.
            reader: the clone that will read the text, which gets its embeddings: in the backward pass, noise and
                softmax of a token are then made once for its gradients in both tables.

        Raises:
            ValueError: if T is less than one, or there are no activations.
        """
        tokens = self.generated_tokens(
            activations, keys, num_text_tokens, tau, temperature, use_cache, chunk_size, reader
        )
        with in_turn(self):
            ids, states, read = zip(*tokens, strict=True)
        return SoftText(
            torch.stack(ids, dim=1),
            self.predictions(torch.stack(states, dim=1), chunk_size),
            None if reader is None else torch.stack(read, dim=1),
        )

    @torch.no_grad()
    def generate_ids(
        self,
        activations: Tensor,
        keys: Tensor | None,
        num_text_tokens: int,
        temperature: float = 1.0,
        chunk_size: int = 0,
    ) -> Tensor:
        """The token ids (B, T) of `generate_soft`, without keeping T x V logits a row."""
        tokens = self.generated_tokens(
            activations, keys, num_text_tokens, temperature=temperature, chunk_size=chunk_size
        )
        with in_turn(self):
            return torch.stack([ids for ids, *_ in tokens], dim=1)

    def generated_tokens(
        self,
        activations: Tensor,
        keys: Tensor | None,
        num_text_tokens: int,
        tau: float = 1.0,
        temperature: float = 1.0,
        use_cache: bool = True,
        chunk_size: int = 0,
        reader: LensClone | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The text token by token: ids (B,); what they were drawn from, logits (B, V), or with a `chunk_size` the
        hidden states (B, d) that these were made of; embeddings (B, d) for a `reader`. See `generate_soft`."""
        if num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {num_text_tokens}; 8 is a good start")
        if len(activations) == 0:
            raise ValueError(NO_ACTIVATIONS)

        use_cache = use_cache and self.may_cache
        recompute = use_cache and self.checkpoints_gradients() and torch.is_grad_enabled()
        # what is computed again, or only then, has a graph of its own, whose end the sums would not see
        sums = {} if recompute or chunk_size > 0 else self.summed_tables(reader)
        head = sums.get(self.base.get_output_embeddings())
        last_output = partial(self.last_output, with_head=chunk_size == 0, head=head)
        dtype = self.token_embedding.weight.dtype
        prefix, suffix = (piece.to(dtype) for piece in self.prompt(sums.get(self)))
        suffix = suffix.expand(len(activations), -1, -1)
        chunk = torch.cat([self.slot_embedding(activations).to(dtype), suffix], dim=1)
        if use_cache:
            passes = self.cached_passes(last_output, activations, prefix, num_text_tokens, recompute)
        else:
            passes = self.whole_passes(last_output, activations, prefix)

        draw = partial(self.drawn, temperature=temperature, tau=tau, sums=sums, keeps_noise=self.keeps_noise)
        for step, next_pass in zip(range(num_text_tokens), passes, strict=False):
            states = next_pass(chunk)
            is_last = step == num_text_tokens - 1
            embed_for: dict[str, LensClone] = {} if is_last else {"next": self}
            if reader is not None:
                embed_for["read"] = reader
            step_keys = None if keys is None else fold_in(keys, step)
            drawn = self.predictions(states, chunk_size).read(partial(draw, keys=step_keys, embed_for=embed_for))
            yield drawn["ids"], states, drawn.get("read")
            if not is_last:
                chunk = drawn["next"][:, None].to(dtype)

    def cached_passes(
        self, last_output: Pass, activations: Tensor, prefix: Tensor, num_text_tokens: int, recompute: bool
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Passes over the next embeddings (B, C, d) of a text, behind the keys and values of those before, without
        end: the first is over the slot and the prompt's suffix, and each of the others over one token."""
        before = prompt_cache(headless(self.base), prefix, len(activations))
        passes = CachedPasses(last_output, before.cache, recompute)
        length = len(prefix) + 1 + len(self.config.suffix_ids) + num_text_tokens
        in_place = not recompute and self.may_attend_in_place(length)
        plainly = partial(not_checkpointed, checkpointed_modules(self.base))

        @contextmanager
        def injected() -> Iterator[None]:
            with plainly(), self.injected(activations, 0):
                yield

        yield lambda embeddings: passes(embeddings + before.nothing, injected)
        by_token = TextPasses(last_output, self.base, before.cache, num_text_tokens - 1) if in_place else passes
        yield from repeat(partial(by_token, around=plainly))

    def whole_passes(
        self, last_output: Callable[[Tensor, None], Tensor], activations: Tensor, prefix: Tensor
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Passes that take the same embeddings, but run all of the text so far anew; the reference for tests."""
        sequence = prefix.expand(len(activations), -1, -1)

        def over_all(embeddings: Tensor) -> Tensor:
            nonlocal sequence
            sequence = torch.cat([sequence, embeddings], dim=1)
            with self.injected(activations, len(prefix)):
                return last_output(sequence, None)

        return repeat(over_all)

    def last_output(
        self, inputs: Tensor, cache: DynamicCache | None, with_head: bool, head: SummedGradient | None
    ) -> Tensor:
        """What the base makes of the last embedding, (B, V) or (B, d), with `head` in the place of its unembedding."""
        with nullcontext() if head is None else head.in_place_of(self.base.get_output_embeddings()):
            return self.last_outputs(inputs, 1, with_head, cache).squeeze(1)

    @staticmethod
    def drawn(
        logits: Tensor,
        rows: slice,
        keys: Tensor | None,
        temperature: float,
        tau: float,
        embed_for: Mapping[str, LensClone],
        sums: Mapping[nn.Module, SummedGradient],
        keeps_noise: bool,
    ) -> dict[str, Tensor]:
        """Tokens drawn from logits (n, V) of some rows of a batch: `ids` (n,), and their embeddings (n, d) in the
        table of each clone, by its name; `sums`: see `embed_sampled`."""
        row_keys = None if keys is None else keys[rows]
        noisy = room_for_noise(logits, row_keys, temperature) if embed_for and keeps_noise else None
        ids = sample_tokens(logits, row_keys, temperature, noisy=noisy)
        if not embed_for:
            return {"ids": ids}
        embeddings = embed_sampled(list(embed_for.values()), logits, ids, row_keys, tau, sums, noisy)
        return {"ids": ids} | dict(zip(embed_for, embeddings, strict=True))

    def may_attend_in_place(self, length: int) -> bool:
        """Whether the tokens of a text, `length` with the prompt, share one buffer of keys and values."""
        # Without gradients nothing is kept anyway.
        pays = torch.is_grad_enabled() and self.base._compiled_call_impl is None
        on_cpu = self.projection.weight.device.type == "cpu"
        wanted = on_cpu if self.attends_in_place is None else self.attends_in_place
        return wanted and pays and can_attend(self.base, length)

    def summed_tables(self, reader: LensClone | None) -> dict[nn.Module, SummedGradient]:
        """Of the unembedding, by its layer, and of the tables that a text is embedded in, by their clones; without
        those that have a gradient at every use."""
        if not (self.sums_gradients and torch.is_grad_enabled()):
            return {}
        head = self.base.get_output_embeddings()
        users: dict[nn.Module, Tensor] = {
            clone: clone.token_embedding.weight for clone in (self, reader) if clone is not None
        }
        # whoever has changed the layer, or compiled what it lies in, expects to find it as it was
        if type(head) is nn.Linear and "forward" not in vars(head) and self.base._compiled_call_impl is None:
            users[head] = head.weight
        sums = {weight: SummedGradient(weight) for weight in users.values() if can_be_summed(weight)}
        return {user: sums[weight] for user, weight in users.items() if weight in sums}

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
