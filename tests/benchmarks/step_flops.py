"""The useful FLOPs of a training step: those of the matrix products that its result cannot do without.

2 m n k for each product, and for attention 4 d for each key that a token attends to. Counted once each: a token of a
context in each block, though several activations are read in it; a token of a text in each block of the decoder, of
the encoder up to the block that it reproduces, and of the reference; heads where logits are wanted; of a last block,
of which only one token is wanted, keys and values for the others. The backward pass makes the gradients of inputs, and
of the weights that are trained. What is computed again (in checkpoints, of logits in chunks), padding, and prompts,
which run once a batch, do not count. So an implementation can only make more than these, and MFU (model FLOPs
utilisation; Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is not raised by work that is done twice.
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
    """Of a step, with an LM term held close to the subject, and a KL under the Gumbel objective.

    Args:
        lens: over a model of Llama's kind.
        objective: "warm_start", "gumbel" or "policy_gradient", as the benchmark sets it (`gpu_step`).
        texts: what is read.
        group_size: texts of an activation under the policy gradient, which is also straight through.
        own: share of rows whose text is drawn in warm start.
    """
    subject, layer, count = lens.subject.model, lens.subject.layer, texts.length
    blocks, width = list(subject.get_decoder().layers), subject.config.hidden_size
    head = 2 * width * subject.config.vocab_size
    head_is_trained = lens.decoder.base.get_output_embeddings().weight.requires_grad
    decoder_head = Products(head, head * (1 + head_is_trained))
    keys = (count + 1) / 2  # of a text's token, in the mean
    decoder = through(list(lens.decoder.base.get_decoder().layers), width, keys)
    maps = Products(2 * width**2, 4 * width**2)  # projection or output map
    # of the encoder's last block, the last token alone goes on behind keys and values
    encoder_blocks = list(lens.encoder.base.layers)
    *most, last = (through([block], width, keys) for block in encoder_blocks)
    ending = through(keys_and_values(encoder_blocks[-1]), width, 0)
    read = sum(block.both for block in most) * count + ending.both * (count - 1) + last.both + maps.both
    reference = (through(blocks, width, keys).forward + head) * count
    written = (decoder.both + decoder_head.both) * count + maps.both
    drawn = (decoder.forward + head) * count
    softly = head * count  # what each token of the vocabulary would have changed
    behind = texts.context_tokens / 2  # keys of a context's token, in the mean
    if objective != "gumbel":
        extracted = context_flops(blocks[: layer + 1], width, behind, texts)
        a_text = written + read
        if objective == "warm_start":
            return extracted + texts.rows * (a_text + own * drawn)
        return extracted + group_size * texts.rows * (a_text + drawn + reference + softly)
    predicted = context_flops(blocks, width, behind, texts) + texts.rows * head
    judged = through(blocks[layer + 1 :], width, behind, keys_are_fixed=True).both + 2 * head
    return predicted + texts.rows * (written + softly + read + reference + judged)


def context_flops(blocks: list[nn.Module], width: int, behind: float, texts: Texts) -> float:
    """Of all contexts through some blocks, of whose last one only the tokens that are read are wanted, and for the
    others keys and values."""
    kept = through(keys_and_values(blocks[-1]), width, 0).forward
    every = through(blocks[:-1], width, behind).forward + kept
    return texts.contexts * texts.context_tokens * every + texts.rows * (
        through(blocks[-1:], width, behind).forward - kept
    )
