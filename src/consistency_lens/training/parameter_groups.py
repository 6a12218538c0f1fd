"""What an optimizer is given: the trained parameters by clone and kind, each with its own rate, decay and clipping."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .arguments import ConsistencyLensTrainingArguments
from .group_settings import GROUPS, of_group

# Names of the parameters of a prompt, before and after its slot.
PROMPTS = ("prefix_embeddings", "suffix_embeddings")


def group_of(name: str) -> str:
    """The group of a parameter of a lens, by its name, under whatever wrappers."""
    head = name.partition(".base.")[0]
    clone = "encoder" if "encoder" in head.split(".") else "decoder"
    if head != name:
        return f"{clone}_lora" if ".lora_" in name else f"{clone}_base"
    return f"{clone}_prompts" if name.endswith(PROMPTS) else f"{clone}_projections"


def trained_groups(model: nn.Module) -> list[str]:
    """The groups that hold trained parameters."""
    present = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [group for group in GROUPS if group in present]


def parameter_groups(model: nn.Module, args: ConsistencyLensTrainingArguments) -> list[dict[str, Any]]:
    """Trained parameters by clone and kind ("decoder_base", "encoder_prompts", ...), with rate and decay.

    A group comes in two parts where some of its parameters decay and others do not; both have its name.
    """
    own_rates, own_decays = args.of_groups("group_learning_rates"), args.of_groups("group_weight_decay")
    parts: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # as is usual, norms and biases do not decay
            parts[group_of(name), parameter.ndim >= 2].append(parameter)
    result = []
    for name in GROUPS:
        rate, decay = of_group(own_rates, name), of_group(own_decays, name)
        rate = default_rate(name, args) if rate is None else rate
        decay = default_decay(name, args) if decay is None else decay
        for is_matrix in (True, False):
            if parameters := parts[name, is_matrix]:
                settings = {"lr": rate, "weight_decay": decay if is_matrix else 0.0}
                result.append({"name": name, "params": parameters, **settings})
    return result


def default_rate(group: str, args: ConsistencyLensTrainingArguments) -> float:
    """The learning rate of a group that has none of its own: that of projections and prompts, or its clone's."""
    if group.endswith(("projections", "prompts")) and args.projection_learning_rate is not None:
        return args.projection_learning_rate
    if group.startswith("encoder") and args.encoder_learning_rate is not None:
        return args.encoder_learning_rate
    return args.learning_rate


def default_decay(group: str, args: ConsistencyLensTrainingArguments) -> float:
    """The weight decay of a group that has none of its own: identity-started projections should not shrink to zero."""
    return args.weight_decay if group.endswith(("base", "lora")) else 0.0


def clip_groups(groups: Iterable[dict[str, Any]], limits: Mapping[str, float], rest: float) -> Tensor:
    """Clips gradients in place: each group that has a limit by its own norm, all others together by theirs.

    Args:
        groups: of the optimizer, with names.
        limits: group or kind -> largest norm of its gradient; 0 leaves it as it is.
        rest: the same for all groups without a limit of their own, as one vector.

    Returns:
        The norm of all gradients before, ().
    """
    clipped: dict[str, list[nn.Parameter]] = defaultdict(list)
    for group in groups:
        own = group["name"] if of_group(limits, group["name"]) is not None else ""
        clipped[own] += [parameter for parameter in group["params"] if parameter.grad is not None]
    norms = []
    for name, parameters in clipped.items():
        if not parameters:
            continue
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        limit = of_group(limits, name) if name else rest
        if limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        norms.append(norm)
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
