"""What is published as others may read it: names of local files and folders, but no place on the publisher's disk."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A path from the root inside a longer text; addresses such as https://... and Hub ids are none.
ABSOLUTE_PATH = r"(?<![\w:/.~-])~?/(?:[^\s/'\",;]+/)*(?P<last>[^\s/'\",;]+)/?"
LONGEST_PATH = 250  # characters; what is longer is prose


def public_name(name: str) -> str:
    """A Hub id as it is; of a path the last part."""
    return Path(name).expanduser().resolve().name if is_path(name) else name


def is_path(name: str) -> bool:
    """Whether a name is one of a file or folder, and no Hub id."""
    return Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~")) or name.count("/") > 1


def public_place(name: str) -> str:
    """A Hub id as it is; a path as one that is relative, and cannot be taken for the id of somebody's repository."""
    if not is_path(name):
        return name
    inside = not Path(name).expanduser().is_absolute() and ".." not in Path(name).parts
    return f"./{Path(name).as_posix() if inside else public_name(name)}"


def without_paths(value: Any, stand_ins: Mapping[str, str]) -> Any:
    """JSON content with the last part alone of each local path, and stand-ins for the names that are given."""
    if isinstance(value, Mapping):
        return {key: without_paths(item, stand_ins) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, stand_ins) for item in value]
    return _without_paths(value, stand_ins) if isinstance(value, str) else value


def _without_paths(text: str, stand_ins: Mapping[str, str]) -> str:
    if text in stand_ins:
        return stand_ins[text]
    if "/" in text and len(text) < LONGEST_PATH and (text.startswith(("./", "../", "~/")) or Path(text).exists()):
        return public_name(text)
    for name in sorted(stand_ins, key=len, reverse=True):
        text = text.replace(name, stand_ins[name]) if "/" in name else text
    return re.sub(ABSOLUTE_PATH, lambda match: match["last"], text)
