"""What decoder and encoder share: clones of the subject that copy no frozen weights, their prompts and statistics."""

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import add_adapter
from .attention import leave_flash
from .cached_passes import checkpointed_modules, keeps_keys_and_values
from .lens_artifact import TrainedTensorsModel
from .quantised import is_quantised, state_beside_weights
from .straight_through import straight_through_embeddings
from .summed_gradient import SummedGradient

logger = logging.getLogger(__name__)


def clone_subject(model: PreTrainedModel, share_weights: bool) -> PreTrainedModel:
    """A second module tree of `model`: over the same tensors (`share_weights`), or over copies of them.

    Sharing puts every parameter and buffer into the memo of `copy.deepcopy`, so only the Python objects are new
    (one copy of frozen weights, however many clones). Copies are float32, for they will be trained: an optimizer's
    small updates are rounded away in bfloat16.

    Raises:
        ValueError: for a copy of quantised weights, which cannot be trained, or for weights that cannot be shared.
    """
    if not share_weights:
        if is_quantised(model):
            raise ValueError("training: got 'full', but quantised weights cannot be trained; set it to lora or frozen")
        copied = copy.deepcopy(model).float()
        leave_flash(copied)
        return copied
    if getattr(model.config, "rescale_every", 0):  # each tree would divide the same weights once more
        raise ValueError(
            f"training: {type(model).__name__} rewrites its weights in place, so no clone can share them; set "
            "training to full, or the model's rescale_every to 0"
        )
    shared = chain(model.parameters(), model.buffers(), state_beside_weights(model))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Switches dropout off for good, in place: in train mode too, a text must depend on the activation alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # OPT, Bloom and many others keep the rate as a number on the module; Falcon reads it from the config at each pass.
    for holder in (*model.modules(), model.config.get_text_config()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)
    return model


def check_reads_embeddings(model: PreTrainedModel) -> None:
    """Checks that a model needs nothing of a token but its embedding, for what fills a slot is no token.

    Raises:
        ValueError: if every block has embeddings of the tokens of its own (Gemma 4's small models).
    """
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise ValueError(
            f"model: each block of {type(model).__name__} looks the tokens up in a table of its own, and an "
            "activation is no token; pass a model without embeddings per layer"
        )


def encode_prompt(prompt: str, slot: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids before and after the slot of a prompt; the prefix starts with BOS where the tokenizer has one.

    Raises:
        ValueError: if the prompt does not hold its slot exactly once.
    """
    if prompt.count(slot) != 1:
        raise ValueError(f"prompt: must hold the slot {slot} exactly once, got {prompt!r}; for example '{slot}'")
    before, after = prompt.split(slot)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after)]
    return bos + parts[0], parts[1]


class Normaliser(nn.Module):
    """Centres activations on the training mean and divides by the training RMS, and back.

    Buffers: `mean` (d,), `rms` (), both of the training cache. A normalised activation has mean square 1, so its mean
    squared error is 1 - FVE in expectation.
    """

    mean: Tensor
    rms: Tensor

    def __init__(self, width: int, device: torch.device | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, device=device))
        self.register_buffer("rms", torch.ones((), device=device))

    def normalise(self, activations: Tensor) -> Tensor:
        """(A - mean) / rms, (..., d), float32."""
        return (activations.float() - self.mean) / self.rms

    def denormalise(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`, (..., d), float32."""
        return normalised.float() * self.rms + self.mean


class LensClone(TrainedTensorsModel):
    """A clone of the subject with a prompt, projections and statistics around it; parent of decoder and encoder."""

    base: PreTrainedModel
    embedding_scale: float
    prefix_embeddings: nn.Parameter | None
    suffix_embeddings: nn.Parameter | None

    def __init__(self, config: Any, base: PreTrainedModel):
        super().__init__(config)
        check_reads_embeddings(base)
        self.base = without_dropout(base)
        if config.training == "lora":
            add_adapter(self.base, config.lora)
        elif config.training == "full":
            self.base.requires_grad_(True)
        else:
            self.base.requires_grad_(False)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The base's own table; its rows, times `embedding_scale`, are what the layer gives."""
        return cast(nn.Embedding, self.base.get_input_embeddings())

    def is_trained_name(self, name: str) -> bool:
        """Whether a tensor of this clone belongs into its artifact."""
        return not name.startswith("base.") or self.config.training == "full" or ".lora_" in name

    def trained_tensors(self) -> dict[str, Tensor]:
        seen: set[int] = set()
        tensors: dict[str, Tensor] = {}
        own_buffers = (item for item in self.named_buffers() if not item[0].startswith("base."))
        for name, tensor in chain(self.named_parameters(remove_duplicate=False), own_buffers):
            if self.is_trained_name(name) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor
        return tensors

    def add_prompt_parameters(self) -> None:
        """Makes the prompt's embeddings parameters (P, d), started from those of its tokens."""
        for side, token_ids in (("prefix", self.config.prefix_ids), ("suffix", self.config.suffix_ids)):
            trainable = self.config.trainable_prompt and len(token_ids) > 0  # an empty parameter could never move
            rows = (
                nn.Parameter(lookup(self.token_embedding, token_ids).detach().float().clone()) if trainable else None
            )
            self.register_parameter(f"{side}_embeddings", rows)

    @cached_property
    def may_cache(self) -> bool:
        """Whether the base can go on behind tokens that have run; if not, each pass is over all of the text so far."""
        may_cache = keeps_keys_and_values(self.base)
        if not may_cache:
            logger.warning(
                "%s: it cannot go on behind a text by keys and values alone, so a text is run anew for each token: "
                "right, but slow",
                type(self.base).__name__,
            )
        return may_cache

    def checkpoints_gradients(self) -> bool:
        """Whether a training pass would recompute blocks in its backward pass."""
        return self.training and len(checkpointed_modules(self.base)) > 0

    def prompt(self, summed: SummedGradient | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompt before and after its slot, (P, d) and (Q, d).

        `summed`: of the table, to which the gradient of a prompt without embeddings of its own is added.
        """

        def embed(token_ids: list[int]) -> Tensor:
            if summed is None:
                return lookup(self.token_embedding, token_ids)
            return summed.rows(torch.tensor(token_ids, device=summed.weight.device).long()) * self.embedding_scale

        prefix, suffix = self.prefix_embeddings, self.suffix_embeddings
        return (
            embed(self.config.prefix_ids) if prefix is None else prefix,
            embed(self.config.suffix_ids) if suffix is None else suffix,
        )


def lookup(embedding: nn.Embedding, token_ids: list[int]) -> Tensor:
    """Embeddings (P, d) of a list of token ids, through the layer itself, so that its own scaling applies once."""
    return embedding(torch.tensor(token_ids, dtype=torch.long, device=embedding.weight.device))


def embed_sampled(
    clones: Sequence[LensClone],
    logits: Tensor,
    ids: Tensor,
    keys: Tensor | None,
    tau: float,
    sums: Mapping[nn.Module, SummedGradient] = MappingProxyType({}),
    noisy: Tensor | None = None,
) -> list[Tensor]:
    """Embeddings (N, d) of sampled tokens in the tables of some clones, straight-through where gradients are wanted.

    `sums`: of tables to whose sum the gradient is added; `noisy`: of the draw (`straight_through.room_for_noise`).
    """
    if not torch.is_grad_enabled():
        return [clone.token_embedding(ids) for clone in clones]
    tables = [sums.get(clone, clone.token_embedding.weight) for clone in clones]
    embeddings = straight_through_embeddings(logits, ids, keys, tables, tau, noisy=noisy)
    return [rows * clone.embedding_scale for rows, clone in zip(embeddings, clones, strict=True)]
