"""An explorer on disk: what a report has read once is not read again, and a report needs no model to show it."""

import hashlib
import json
from numbers import Real
from pathlib import Path
from typing import Any, cast

from ..atomic_write import write_text
from ..lens_artifact import WEIGHTS_FILE
from .explorer import FORMAT, VERSION, Explorer

EXPLORER_FILE = "explorer.json"
NUMBERS = ("fve", "kl", "norm", "variance")
COLUMNS = ("tokens", "positions", "explanations", "losses", "before", "after", *NUMBERS)


def write_explorer(path: Path, explorer: Explorer) -> None:
    """Writes an explorer whole or not at all, on one line: it is long. Halves of characters are kept as escapes."""
    write_text(path, json.dumps(explorer, allow_nan=False, separators=(",", ":")) + "\n")


def read_explorer(path: Path) -> Explorer:
    """Reads an explorer back and checks that a page can show it.

    Raises:
        ValueError: if it is none, or broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"explorer: cannot read {str(path)!r} ({error}); remove it, or pass --texts") from error
    problem = problem_of(content)
    if problem:
        raise ValueError(f"explorer: {str(path)!r} {problem}; remove it, and it is written anew")
    return cast(Explorer, content)


def problem_of(content: Any) -> str | None:
    """What is wrong with an explorer; None if nothing is."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return "is no explorer"
    if content.get("version") != VERSION:
        return f"is of version {content.get('version')!r}, and {VERSION} is read here"
    words, texts = content.get("words"), content.get("texts")
    known = isinstance(content.get("source"), str) and isinstance(content.get("lens"), str | None)
    known = known and is_place(content.get("max_tokens")) and isinstance(content.get("ablation"), bool)
    if not known:
        return "does not say where it is from"
    if not isinstance(words, list) or not is_list_of(words, str) or not isinstance(texts, list) or not texts:
        return "holds no texts"
    for index, text in enumerate(texts):
        if not isinstance(text, dict) or not isinstance(text.get("title"), str):
            return f"has no title for text {index}"
        broken = next((name for name in COLUMNS if not is_column(name, text, len(words))), None)
        if broken:
            return f"has a broken column {broken!r} in text {index}"
    return None


def is_column(name: str, text: dict[str, Any], num_words: int) -> bool:
    """Whether a column of a text is as `ExplorerText` says."""
    column = text.get(name)
    if not isinstance(column, list) or len(column) != len(text["tokens"] if name != "tokens" else column):
        return False
    if name == "tokens":
        return len(column) > 0 and all(is_place(place, num_words) for place in column)
    if name == "positions":
        return all(is_place(position) for position in column)
    if name in NUMBERS:
        return all(is_number(number) for number in column)
    if name == "explanations":
        return all(is_list_of(words, str) for words in column)
    if name == "losses":
        explained = text.get("explanations", [])
        return len(explained) == len(column) and all(
            isinstance(of, list) and all(map(is_number, of)) and len(of) in (0, len(words))
            for of, words in zip(column, explained, strict=True)
        )
    return all(
        isinstance(top, list)
        and len(top) % 2 == 0
        and all(is_place(place, num_words) for place in top[::2])
        and all(map(is_number, top[1::2]))
        for top in column
    )


def is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def is_place(value: Any, below: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def is_number(value: Any) -> bool:
    """A finite number: JSON as Python reads it knows others."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) < float("inf")


def weights_sha256(folder: str | Path) -> str | None:
    """Sha256 of a saved lens's weights file; None where there is none, as for a lens on the Hub."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
