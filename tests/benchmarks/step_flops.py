"""The useful FLOPs of a training step: those of the matrix products that its result cannot do without.

2 m n k for each product, and for attention 4 d for each key that a token attends to. Counted once each: a token of a
context in each block, though several activations are read in it; a token of a text in each block of the decoder, of
the encoder up to the block that it reproduces, and of the reference; heads where logits are wanted; of a last block,
of which only one token is wanted, keys and values for the others. The backward pass makes the gradients of inputs, and
of the weights that are trained. What is computed again (in checkpoints, of logits in chunks, of a text that was drawn
without gradients and is scored with them), padding, masked keys, and prompts, which run once a batch, do not count. So
an implementation hardly makes less, and MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv:2204.02311,
appendix B) is not raised by work that is done twice.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from consistency_lens import ConsistencyLensModel


@dataclass(frozen=True)
class Products:
    """What a token takes forward and backward, in FLOPs."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Texts:
    """How much of a step there is.

    Attributes:
        rows: activations.
        contexts: sequences that they are read in.
        context_tokens: mean tokens of these.
        length: T, tokens of a text.
    """

    rows: int
    contexts: int
    context_tokens: float
    length: int

    @classmethod
    def of(cls, batch: dict[str, Any], length: int) -> "Texts":
        """Those of a batch of the trainer's loader."""
        mask = batch["attention_mask"]
        return cls(len(batch["positions"]), len(mask), float(mask.sum()) / len(mask), length)


def entries(modules: nn.ModuleList | list[nn.Module], trained: bool = False) -> int:
    """Numbers in the matrices of some modules, or in those that are trained."""
    return sum(p.numel() for m in modules for p in m.parameters() if p.ndim == 2 and (p.requires_grad or not trained))


def keys_and_values(block: nn.Module) -> list[nn.Module]:
    """What makes keys and values in a block of Llama's kind."""
    return [block.self_attn.k_proj, block.self_attn.v_proj]


def through(blocks: list[nn.Module], width: int, keys: float, keys_are_fixed: bool = False) -> Products:
    """Of a token that attends to so many keys in each of some blocks; its input has a gradient, and so have the keys
    and values that it attends to, if they are not fixed."""
    products, attention = 2 * entries(blocks), 4 * width * keys * len(blocks)
    of_attention = attention if keys_are_fixed else 2 * attention
    return Products(products + attention, products + of_attention + 2 * entries(blocks, trained=True))


def useful_flops(
    lens: ConsistencyLensModel, objective: str, texts: Texts, group_size: int = 4, own: float = 0.25
) -> float:
    """Of a step as the benchmark takes it (`gpu_step`): the sum of `useful_parts`."""
    return sum(useful_parts(lens, objective, texts, group_size, own).values())


def useful_parts(
    lens: ConsistencyLensModel, objective: str, texts: Texts, group_size: int = 4, own: float = 0.25
) -> dict[str, float]:
    """FLOPs of each part of a step, with an LM term held close to the subject, and a KL under the Gumbel objective.

    Args:
        lens: over a model of Llama's kind.
        objective: "warm_start", "gumbel" or "policy_gradient"; the last is also straight through.
        texts: what is read.
        group_size: texts of an activation under the policy gradient.
        own: share of rows whose text is drawn in warm start, and is not the one that is scored.
    """
    subject, width, layer = lens.subject.model, lens.subject.model.config.hidden_size, lens.subject.layer
    blocks, head = list(subject.get_decoder().layers), 2 * width * subject.config.vocab_size
    behind = texts.context_tokens / 2  # keys of a context's token, in the mean
    drawn, written = text_products(lens, texts.length)
    parts = {
        "context": context_flops(blocks if objective == "gumbel" else blocks[: layer + 1], width, behind, texts),
        "decoder": texts.rows * written,
        "encoder": texts.rows * encoder_flops(lens, texts.length),
    }
    if objective == "warm_start":
        return parts | {"drawn": own * texts.rows * drawn}
    # its first token is the same for every text
    keys = (texts.length + 1) / 2
    parts["reference"] = texts.rows * (texts.length - 1) * (through(blocks, width, keys).forward + head)
    parts["straight_through"] = (
        texts.rows * head * texts.length
    )  # what each token of the vocabulary would have changed
    if objective == "policy_gradient":
        of_texts = {name: group_size * flops for name, flops in parts.items() if name != "context"}
        return parts | of_texts
    judged = through(blocks[layer + 1 :], width, behind, keys_are_fixed=True).both + 2 * head
    return parts | {"judgement": texts.rows * (head + judged)}


def text_products(lens: ConsistencyLensModel, count: int) -> tuple[float, float]:
    """Of the decoder for a text of so many tokens: drawn without gradients, and written with them."""
    base, width = lens.decoder.base, lens.subject.model.config.hidden_size
    unembedding = base.get_output_embeddings().weight
    head = 2 * unembedding.numel()
    token = through(list(base.get_decoder().layers), width, (count + 1) / 2)
    of_projection = Products(2 * width**2, 2 * width**2)  # an activation has no gradient
    backward = (token.backward + head * (1 + unembedding.requires_grad)) * count + of_projection.backward
    drawn = (token.forward + head) * count + of_projection.forward
    return drawn, drawn + backward


def encoder_flops(lens: ConsistencyLensModel, count: int) -> float:
    """Of the encoder for a text of so many tokens, whose embeddings have a gradient: of its last block, only the last
    token goes on behind keys and values."""
    blocks, width = list(lens.encoder.base.layers), lens.subject.model.config.hidden_size
    every = through(blocks[:-1], width, (count + 1) / 2).both + through(keys_and_values(blocks[-1]), width, 0).both
    last = through(blocks[-1:], width, count).both - through(keys_and_values(blocks[-1]), width, 0).both
    return every * count + last + 6 * width**2  # and the output map


def context_flops(blocks: list[nn.Module], width: int, behind: float, texts: Texts) -> float:
    """Of all contexts through some blocks, of whose last one only the tokens that are read are wanted, and for the
    others keys and values."""
    kept = through(keys_and_values(blocks[-1]), width, 0).forward
    every = through(blocks[:-1], width, behind).forward + kept
    last = through(blocks[-1:], width, behind).forward - kept
    return texts.contexts * texts.context_tokens * every + texts.rows * last
