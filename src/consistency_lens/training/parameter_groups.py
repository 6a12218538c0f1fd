"""What an optimizer is given: the trained parameters by clone and kind, each with its own rate and decay."""

from collections import defaultdict
from typing import Any

from torch import nn

from .arguments import ConsistencyLensTrainingArguments


def parameter_groups(model: nn.Module, args: ConsistencyLensTrainingArguments) -> list[dict[str, Any]]:
    """Trained parameters by clone and kind ("decoder_base", "encoder_projections", ...), with rate and decay."""
    rates = {"decoder": args.learning_rate, "encoder": args.learning_rate}
    if args.encoder_learning_rate is not None:
        rates["encoder"] = args.encoder_learning_rate
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            clone = "encoder" if "encoder." in name else "decoder"
            kind = "base" if ".base." in name else "projections"
            # as is usual, norms and biases do not decay; identity-started projections should not shrink to zero
            decays = kind == "base" and parameter.ndim >= 2
            groups[f"{clone}_{kind}", decays].append(parameter)
    result = []
    for (name, decays), parameters in groups.items():
        clone, kind = name.split("_")
        own_rate = args.projection_learning_rate if kind == "projections" else None
        rate = rates[clone] if own_rate is None else own_rate
        decay = args.weight_decay if decays else 0.0
        result.append({"name": name, "params": parameters, "lr": rate, "weight_decay": decay})
    return result
