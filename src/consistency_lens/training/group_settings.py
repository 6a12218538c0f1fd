"""Settings of parameter groups, written as one would say them: `"prompts 1e-3"`, `"encoder_base 2e-4"`."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

CLONES = ("decoder", "encoder")
KINDS = ("base", "lora", "projections", "prompts")
# In the order of the optimizer's groups; the rate of the first that a run trains is logged as `learning_rate`.
GROUPS = tuple(f"{clone}_{kind}" for kind in KINDS for clone in CLONES)

Setting = TypeVar("Setting")


def check_group(setting: str, group: str) -> None:
    """Checks the name of a group: that of one (`encoder_base`), or a kind (`base`), which stands for both clones'.

    Raises:
        ValueError: if there is no such group.
    """
    if group not in GROUPS + KINDS:
        raise ValueError(
            f"{setting}: no group is called {group!r}; the groups are {', '.join(GROUPS)}, and "
            f"{', '.join(KINDS)} for those of both clones"
        )


def group_values(setting: str, texts: Sequence[str], least: float = 0.0) -> dict[str, float]:
    """Reads `["prompts 1e-3", "encoder_base 2e-4"]`.

    Args:
        setting: its name, for errors.
        texts: a group and a number each.
        least: the smallest number that is allowed.

    Raises:
        ValueError: for an unknown group, one that is named twice, what is no number, or one that is too small.
    """
    values: dict[str, float] = {}
    for text in texts:
        group, *rest = str(text).split() or [""]
        check_group(setting, group)
        if group in values:
            raise ValueError(f"{setting}: {group} is set twice, in {list(texts)}; leave one out")
        try:
            (values[group],) = map(float, rest)
        except ValueError:
            raise ValueError(f"{setting}: each is '<group> <number>', such as 'prompts 1e-3', got {text!r}") from None
        if not least <= values[group] < float("inf"):
            raise ValueError(f"{setting}: must be {least:g} or more, got {text!r}")
    return values


def of_group(values: Mapping[str, Setting], group: str) -> Setting | None:
    """What is set for a group: by its own name, else by its kind; None if neither is."""
    return values.get(group, values.get(group.partition("_")[2]))
