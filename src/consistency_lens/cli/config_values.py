"""The values of a YAML recipe as the flags that they stand for, so that the flags' own types read them."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

NUMBERS = {int, float, types.NoneType}


def config_values(config: Mapping[str, Any], dataclasses: Sequence[Any]) -> dict[str, Any]:
    """The values of a file as a parser takes them for defaults; keys of no argument are left out.

    A number is handed on as text, for YAML takes 1e-3 for a string and 1 for an integer. A single value stands for a
    list of one, and a mapping for a list of its lines: `{prompts: 1e-3}` is `["prompts 1e-3"]`.

    Raises:
        ValueError: for a value of a kind that the argument is not.
    """
    hints: dict[str, Any] = {}
    for dataclass in dataclasses:
        hints |= get_type_hints(dataclass)
    return {key: value_as_flag(key, value, hints[key]) for key, value in config.items() if key in hints}


def value_as_flag(key: str, value: Any, hint: Any) -> Any:
    """One value, by the type of its argument.

    Raises:
        ValueError: if it is of another kind.
    """
    union = isinstance(hint, types.UnionType) or get_origin(hint) is Union
    kinds = {get_origin(kind) or kind: kind for kind in (get_args(hint) if union else [hint])}
    if value is None:
        if types.NoneType not in kinds:
            raise ValueError(f"--config: {key} has no value; give it one, or remove the line")
        return None
    if isinstance(value, dict) and dict in kinds:
        return value
    if list in kinds and (isinstance(value, dict | list) or str not in kinds):
        element = next(iter(get_args(kinds[list])), str)
        return [element_as_flag(key, part, element) for part in parts_of(value)]
    if isinstance(value, dict | list):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        raise ValueError(f"--config: {key} takes one value, got {kind}: {shortened(value)}")
    if isinstance(value, bool):
        if NUMBERS.issuperset(kinds):
            raise ValueError(f"--config: {key} must be a number, got {value}")
        return value
    return str(value)


def parts_of(value: Any) -> list[Any]:
    """The parts of what stands for a list."""
    if isinstance(value, dict):
        return [name if part is None else f"{name} {shortened(part)}" for name, part in value.items()]
    return value if isinstance(value, list) else [value]


def element_as_flag(key: str, part: Any, element: Any) -> Any:
    """One part of a list."""
    if part is None or isinstance(part, dict | list) or (isinstance(part, bool) and element in NUMBERS):
        raise ValueError(f"--config: {key} takes a list of single values, got {shortened(part)} in it")
    if element in NUMBERS:
        try:
            return element(str(part))
        except ValueError:
            raise ValueError(f"--config: {key} takes numbers ({element.__name__}), got {shortened(part)}") from None
    return str(part)


def shortened(value: Any) -> str:
    """A value in an error, which stays one line."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
