"""What a run needs of a process's memory, from the shapes of its tensors alone: no weight is ever allocated.

Weights, gradients and optimizer states are counted tensor by tensor, and are exact for one process without mixed
precision. Activations are an estimate: what a backward pass keeps of each linear layer's input and output, and the
logits. What the device's runtime, the allocator and the strategies' own buckets take comes on top.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..lens_clone import LensClone
from ..modeling_consistency_lens import ConsistencyLensModel
from ..residual_stream import headless
from .arguments import ConsistencyLensTrainingArguments
from .parameter_groups import parameter_groups
from .trainer import ConsistencyLensTrainer

logger = logging.getLogger(__name__)

# Adam in 8 bits: two moments of a byte, with a float32 scale of each 256 values; small tensors keep float32 moments.
BYTES_IN_8_BITS, SMALLEST_IN_8_BITS = 2 * (1 + 4 / 256), 4096
ADAM_BYTES, FLOAT32_BYTES, HALF_BYTES = 8, 4, 2
# A quantised matrix: bytes of an entry, and entries that share a float32 scale (in 8 bits those of a row).
IN_4_BITS, ENTRIES_OF_A_SCALE = 0.5, 64
# Held for each logit in float32 beside the logits themselves: log-probabilities and a gradient.
COPIES_OF_LOGITS = 3


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs under a strategy.

    Attributes:
        strategy: "1 process", "ddp", "fsdp2", "zero2" or "zero3".
        weights: of subject, decoder and encoder, what they share once; of the reference and of running averages.
        gradients: of the trained tensors, and DDP's second copy of them.
        optimizer: its states, and the copy of the trained tensors that DeepSpeed keeps.
        activations: the most that any stage keeps for its backward pass, logits and key-value caches included.
    """

    strategy: str
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, whatever trees it is part of."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def num_bytes(tensors: Iterable[Tensor], stored: Mapping[int, int] | None = None) -> int:
    """Bytes of the tensors, each counted once; `stored` has those of quantised ones, by the tensor's id."""
    known = stored or {}
    return sum(known.get(id(t), t.numel() * t.element_size()) for t in unique(tensors))


def quantised_bytes(subject: PreTrainedModel, quantization: str | None) -> dict[int, int]:
    """Bytes of each weight that bitsandbytes would quantise, scales included, by the tensor's id.

    All linear layers but the unembedding are quantised.
    """
    if quantization is None:
        return {}
    head = subject.get_output_embeddings()
    layers = [m for m in subject.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    if quantization == "8bit":
        outputs = {id(m.weight): m.out_features if isinstance(m, nn.Linear) else m.nf for m in layers}
        return {id(m.weight): m.weight.numel() + FLOAT32_BYTES * outputs[id(m.weight)] for m in layers}
    entry = IN_4_BITS + FLOAT32_BYTES / ENTRIES_OF_A_SCALE
    return {id(m.weight): round(m.weight.numel() * entry) for m in layers}


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def trained_parameters(lens: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer is given."""
    return [parameter for parameter in lens.parameters() if parameter.requires_grad]


def optimizer_bytes(lens: ConsistencyLensModel, args: ConsistencyLensTrainingArguments) -> int:
    """Bytes of the optimizer's states: those that it makes for tensors of these shapes, which it is asked for.

    Args:
        lens: with its parameters on the meta device, where a step costs nothing and changes nothing.
    """
    trained = trained_parameters(lens)
    if "8bit" in str(args.optim):
        return round(
            sum(p.numel() * (BYTES_IN_8_BITS if p.numel() >= SMALLEST_IN_8_BITS else ADAM_BYTES) for p in trained)
        )
    optimizer_class, kwargs = ConsistencyLensTrainer.get_optimizer_cls_and_kwargs(args, lens)
    if "fused" in kwargs:  # as many states, but a kernel that the meta device has not
        kwargs = {**kwargs, "fused": False}
    optimizer = optimizer_class(parameter_groups(lens, args), **kwargs)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except (NotImplementedError, RuntimeError) as error:
        logger.warning("%s: states counted as those of Adam, for they depend on values (%s)", args.optim, error)
        return ADAM_BYTES * sum(p.numel() for p in trained)
    finally:
        for parameter in trained:
            parameter.grad = None
    states = (value for state in optimizer.state.values() for value in state.values())
    return num_bytes(value for value in states if isinstance(value, Tensor))


def memory_estimates(
    lens: ConsistencyLensModel,
    args: ConsistencyLensTrainingArguments,
    processes: int,
    max_length: int,
    stored: Mapping[int, int] | None = None,
    streamed: bool = False,
) -> list[Memory]:
    """What a process needs: alone, or under each strategy with that many processes.

    Args:
        lens: with its parameters on the meta device, and with its subject.
        max_length: tokens of the longest context.
        stored: bytes of quantised tensors, by the tensor's id.
        streamed: whether rows are streamed, which have an A' of their own.
    """
    subject, trained = all_tensors(lens.subject.model), trained_parameters(lens)
    copies = copies_bytes(lens, args)
    apart = sum(
        num_bytes(tensors, stored) for tensors in (subject, all_tensors(lens.decoder), all_tensors(lens.encoder))
    )
    weights = apart if args.share_weights == "false" else num_bytes([*subject, *all_tensors(lens)], stored)
    gradients, states = num_bytes(trained), optimizer_bytes(lens, args)
    stages = range(len(args.parsed_stages()))
    activations = max(activation_bytes(lens, args, index, max_length, streamed) for index in stages)
    if processes == 1:
        return [Memory("1 process", weights + copies, gradients, states, activations)]
    # what is spread cannot be shared between trees
    part, own = (apart + copies) // processes, gradients // processes
    # DeepSpeed works on a flat copy of what it trains
    flat = (states + FLOAT32_BYTES * sum(p.numel() for p in trained)) // processes
    return [
        Memory("ddp", weights + copies, 2 * gradients, states, activations),
        Memory("fsdp2", part, own, states // processes, activations),
        Memory("zero2", weights + copies, own, flat, activations),
        Memory("zero3", part, own, flat, activations),
    ]


def copies_bytes(lens: ConsistencyLensModel, args: ConsistencyLensTrainingArguments) -> int:
    """Bytes of the decoder as warm start leaves it, its trained tensors, where text is held close to that; and of the
    running averages of all trained tensors."""
    averages = num_bytes(trained_parameters(lens)) if args.ema_decay else 0
    return averages + (num_bytes(trained_parameters(lens.decoder)) if args.keeps_warm_start() else 0)


def activation_bytes(
    lens: ConsistencyLensModel,
    args: ConsistencyLensTrainingArguments,
    stage: int,
    max_length: int,
    streamed: bool = False,
) -> int:
    """Bytes that a stage keeps for its backward pass of one micro-batch, estimated.

    Args:
        stage: its index.
        max_length: tokens of the longest context, which the subject keeps keys and values of where it judges.
        streamed: whether rows are streamed, which have an A' of their own.
    """
    objective, batch = args.parsed_stages()[stage].objective, args.per_device_train_batch_size
    rows = batch * (args.group_size if objective == "policy_gradient" else 1)
    if objective == "gumbel" and args.needs_others() and (streamed or not args.pair_in_batch):
        rows *= 2
    half, checkpointing = args.bf16 or args.fp16, bool(args.gradient_checkpointing)
    length = lens.config.num_text_tokens
    kept = clone_bytes(lens.decoder, length, rows, half, checkpointing)
    kept += clone_bytes(lens.encoder, length, rows, half, checkpointing)
    config = lens.subject.model.config.get_text_config()
    copies = COPIES_OF_LOGITS + (args.has_weight("lm") and objective != "warm_start")
    # in chunks, hidden states are kept in the place of logits: small beside what the blocks keep
    held = min(rows * length, args.logits_chunk_size or rows * length)
    kept += held * config.vocab_size * FLOAT32_BYTES * copies
    if objective == "gumbel":  # the cache grows by a copy at each token, and each copy is kept
        steps = length * (length + 1) // 2
        kept += rows * steps * cache_width(config) * (HALF_BYTES if half else element_size(lens.decoder))
    judged = objective == "gumbel" and args.has_weight("kl") or objective == "policy_gradient" and args.reward == "-kl"
    if judged:
        kept += batch * max_length * cache_width(config) * lens.subject.model.dtype.itemsize
    if half:  # autocast's copies of float32 matrices
        kept += HALF_BYTES * sum(
            p.numel() for p in unique(lens.parameters()) if p.dtype == torch.float32 and p.ndim > 1
        )
    return kept


def clone_bytes(clone: LensClone, length: int, rows: int, half: bool, checkpointing: bool) -> int:
    """Bytes that a clone keeps of `rows` texts of `length` tokens: the inputs and outputs of its blocks' matrices.

    With `checkpointing` only each block's input is kept, and all of one block, which is being recomputed.
    """
    tokens = rows * (length + 1 + len(clone.config.prefix_ids) + len(clone.config.suffix_ids))
    stack = headless(clone.base)
    tables = {id(module.weight) for module in stack.modules() if isinstance(module, nn.Embedding)}
    matrices = [(name, p) for name, p in stack.named_parameters() if p.ndim == 2 and id(p) not in tables]
    # an adapter's input and output are those of the layer that it is added to
    numbers = sum(min(p.shape) if ".lora_" in name else sum(p.shape) for name, p in matrices)
    blocks = stack.config.get_text_config().num_hidden_layers
    if checkpointing and blocks:
        numbers = blocks * clone.token_embedding.embedding_dim + numbers // blocks
    return tokens * numbers * (HALF_BYTES if half else element_size(clone))


def element_size(clone: LensClone) -> int:
    """Bytes of a number in a clone's blocks."""
    return clone.token_embedding.weight.element_size()


def cache_width(config: PreTrainedConfig) -> int:
    """Numbers that the key-value cache holds for a token, all blocks together."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * size * (getattr(config, "num_key_value_heads", None) or heads)
