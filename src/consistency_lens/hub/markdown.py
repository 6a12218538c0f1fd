"""Text that others wrote inside Markdown, so that it shows as it is and breaks nothing.

What Markdown or HTML reads as a mark becomes a numeric character reference: that holds in a paragraph, in a cell of a
table and between HTML tags alike, where a backslash or a code span does not.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..evaluation.report import markdown_table

MARKS = set("&<>|`*~[]\\$#@")
# `http://` and `www.` become links of themselves, `:name:` an emoji, `_so_` slanted, and spaces one space
SPOTS = re.compile(r"(?<=www)\.|:(?=//|[\w+-]+:)|(?<![^\W_])_|_(?![^\W_])|  +")
# shown as a picture of themselves, or by their number: they end a line or turn the direction of a text
NEWLINE = "⏎"
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # parts of words and of emoji
SIMPLE_CODE = re.compile(r"[\w ./:@+\-=,()%'\"<>{}\[\]*#]+")


def plain(text: object) -> str:
    """A text on one line, as it is; not for the start of a line, where `-` or `1.` begins a list."""
    line = "".join(_seen(character) for character in str(text).replace("\r\n", "\n"))
    return SPOTS.sub(_referenced_spot, "".join(_reference(c) if c in MARKS else c for c in line))


def code(text: object) -> str:
    """The same as code: in backticks where nothing in it speaks against that."""
    text = str(text)
    if SIMPLE_CODE.fullmatch(text) and text.strip() == text:
        return f"`{text}`"
    return f"<code>{plain(text)}</code>"


def literal(value: Any) -> str:
    """A string as a Python literal on one line."""
    return json.dumps(value, ensure_ascii=True)


def shell(word: object) -> str:
    """A word of a shell command on one line."""
    return shlex.quote(" ".join(str(word).split()))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table whose cells are Markdown already; its first column is text, as are the others without `numbers`."""
    return markdown_table(columns, rows, numbers)


def _seen(character: str) -> str:
    if character == "\n":
        return NEWLINE
    if unicodedata.category(character) not in UNSEEN or character in JOINERS:
        return character
    number = ord(character)
    return chr(0x2400 + number) if number < 0x20 else f"U+{number:04X}"


def _reference(character: str) -> str:
    return f"&#{ord(character)};"


def _referenced_spot(match: re.Match[str]) -> str:
    spot = match[0]
    return " " + "&nbsp;" * (len(spot) - 1) if spot.isspace() else _reference(spot)
