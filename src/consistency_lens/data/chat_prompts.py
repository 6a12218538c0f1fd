"""Prompts for a chat model: conversations that wait for an answer, from a file or a dataset."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from .dataset_reading import check_source, read_dataset

logger = logging.getLogger(__name__)

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant")
MESSAGE_KEYS = ("role", "content", "thinking")
COLUMNS = ("prompt", "messages")

Message = dict[str, str]
Row = tuple[str, Mapping[str, Any]]  # where it stands, for error messages, and what it holds


class Prompt(NamedTuple):
    """A conversation that ends with the user's turn."""

    id: str
    """The row's own `id`, or a hash of the messages; a repeated one ends in `-2`, `-3` and so on."""
    messages: list[Message]


def read_prompts(
    source: str,
    column: str | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Reads the prompts of a .jsonl or .txt file (one a line) or of a dataset (`data.dataset_reading`), in order.

    A prompt is a text, which becomes the user's message, or a list of messages with `role`, `content` and, in those of
    the assistant, `thinking`. Empty prompts are left out, and a warning says how many.

    Args:
        column: that holds the prompts; by default `prompt`, and `messages` for a row without it.
        config: of a dataset that has several.
        split: of a dataset.
        revision: of a dataset on the Hub.
        system_prompt: first message of the conversations that have none of that kind.
        limit: read no more prompts than this.

    Raises:
        ValueError: if the source cannot be read or, being local, has no such revision or configuration, a row has no
            prompt or a conversation that no chat model can continue, or nothing is left.
    """
    check_source(source, config, revision, "prompts")
    columns = (column,) if column else COLUMNS
    if Path(source).suffix in (".jsonl", ".txt"):
        rows = _file_rows(source, columns)
    else:
        rows = _dataset_rows(source, columns, config, split, revision)
    prompts: list[Prompt] = []
    taken: set[str] = set()
    for own_id, messages in islice(_conversations(rows, columns, system_prompt), limit):
        prompt_id = _unused(own_id or messages_hash(messages), taken)
        taken.add(prompt_id)
        prompts.append(Prompt(prompt_id, messages))
    if not prompts:
        raise ValueError(f"prompts: {source!r} holds none; pass a source with at least one prompt")
    return prompts


def messages_hash(messages: Sequence[Mapping[str, str]]) -> str:
    """16 hexadecimal digits that stand for a conversation, equal on every machine."""
    content = json.dumps(messages, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unused(wanted: str, taken: set[str]) -> str:
    if wanted not in taken:
        return wanted
    return next(name for number in count(2) if (name := f"{wanted}-{number}") not in taken)


def _file_rows(source: str, columns: Sequence[str]) -> Iterator[Row]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"prompts: no file at {source!r}; pass the path of a .jsonl or .txt file")
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            place = f"line {number} of {source!r}"
            if line.strip():
                yield place, _json_row(line, place) if path.suffix == ".jsonl" else {columns[0]: line.strip()}


def _dataset_rows(
    source: str, columns: Sequence[str], config: str | None, split: str, revision: str | None
) -> Iterator[Row]:
    with TemporaryDirectory() as cache:
        try:
            dataset = read_dataset(source, config, split, revision, cache_dir=Path(cache))
        except ValueError as error:
            raise ValueError(f"prompts: {str(error).removeprefix('dataset: ')}") from error
        found = [name for name in columns if name in dataset.column_names]
        if not found:
            raise ValueError(
                f"prompts: {source!r} has no column {' or '.join(columns)}, it has "
                f"{', '.join(dataset.column_names)}; pass --prompt_column"
            )
        found += [name for name in ("id",) if name in dataset.column_names]
        for number, row in enumerate(dataset.select_columns(found)):
            yield f"row {number} of {source!r}", row


def _json_row(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"prompts: {place} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"prompts: {place} must hold an object, got {type(row).__name__}; write one object a line")
    return row


def _conversations(
    rows: Iterator[Row], columns: Sequence[str], system_prompt: str | None
) -> Iterator[tuple[str | None, list[Message]]]:
    """Own id and messages of each row that is not empty."""
    empty = 0
    for place, row in rows:
        if not any(name in row for name in columns):
            raise ValueError(
                f"prompts: {place} has no {' or '.join(columns)}, it has {', '.join(row)}; pass --prompt_column"
            )
        value = next((row[name] for name in columns if row.get(name) is not None), None)
        if not value or (isinstance(value, str) and not value.strip()):
            empty += 1
            continue
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value, place)
        if not all(is_unicode(text) for message in messages for text in message.values()):
            raise ValueError(f"prompts: {place} has half of a surrogate pair, which is no character; take it out")
        if system_prompt and messages[0]["role"] not in SYSTEM_ROLES:
            messages.insert(0, {"role": "system", "content": system_prompt})
        yield None if row.get("id") is None else str(row["id"]), messages
    if empty:
        logger.warning("prompts: %d empty ones are left out", empty)


def _messages(value: Any, place: str) -> list[Message]:
    """Messages in the form that is sent and stored, without the fields that are null.

    Raises:
        ValueError: for another type, an unknown role or key, content that is no text, or a last turn that is not the
            user's.
    """
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(f"prompts: {place} must be a text or a list of messages, got {type(value).__name__}")
    messages = [{key: text for key, text in message.items() if text is not None} for message in value]
    for message in messages:
        if message.get("role") not in ROLES:
            raise ValueError(f"prompts: {place} has the role {message.get('role')!r}; one of: {', '.join(ROLES)}")
        for key in ("content", *message):
            if key not in MESSAGE_KEYS or not isinstance(message.get(key), str):
                raise ValueError(
                    f"prompts: {place} has a message whose {key!r} is {message.get(key)!r}; a message holds the texts "
                    f"{', '.join(MESSAGE_KEYS)} and nothing else"
                )
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"prompts: {place} ends with the role {messages[-1]['role']!r}; end it with the turn of the user, which "
            "the model is to answer"
        )
    return messages
