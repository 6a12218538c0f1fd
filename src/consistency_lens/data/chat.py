"""Chats to text: messages through the tokenizer's chat template, native thinking included where the template knows it.

A message is a dict with `role`, `content` and whatever else the template reads. What a model thought before it
answered stands under `thinking` (gpt-oss), `reasoning_content` (Qwen, DeepSeek) or `reasoning`, and is given to the
template under the first two, whichever it reads. Templates differ in whether they render it, and many do so in the
last turn alone, so each message is tried.
"""

import hashlib
import json
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")


class RenderedChat(NamedTuple):
    """A chat as the model would read it."""

    text: str
    """Control tokens included, BOS too where the template writes one."""
    thinking: int
    """Messages with thinking."""
    thinking_dropped: int
    """Those of them whose thinking is not in the text, for the template leaves it out."""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template.

    Raises:
        ValueError: if it has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"chat: the tokenizer of {tokenizer.name_or_path!r} has no chat template; pass a chat model, or a text "
            "column instead of messages"
        ) from error


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 of the tokenizer's chat template."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def read_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of one row of a data set, without the keys that are None, which Arrow fills in.

    Args:
        where: names the row in an error.

    Raises:
        ValueError: if it is no list of messages, each a dict with a role.
    """
    messages = [] if value is None else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(
            f"{where} holds {shortened(value)}; it must be a list of messages such as "
            '{"role": "user", "content": "..."}'
        )
    messages = [without_none(message) for message in messages]
    for index, message in enumerate(messages):
        if "role" not in message:
            raise ValueError(f"{where}: message {index} has no role but {', '.join(message) or 'nothing'}; name it")
    return messages


def without_none(value: Any) -> Any:
    """A message without its keys that are None, in any depth: a template may print them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def chat_key(messages: list[dict[str, Any]]) -> str:
    """The text that stands for a chat where documents are told apart: its messages, not what a template makes of them.

    Templates may write today's date, and each model has its own; a chat falls on the same side of a split for all.
    """
    return json.dumps(messages, sort_keys=True, ensure_ascii=False)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str) -> RenderedChat:
    """Renders a chat with one message or more, and counts the messages whose thinking the template leaves out.

    To count them the chat is rendered once more, with a mark in place of each message's thinking.

    Args:
        where: names the row in an error.

    Raises:
        ValueError: if the template refuses the chat.
    """
    messages = [_with_thinking(message) for message in messages]
    marks = {index: f"thinking-of-message-{index}-stands-here" for index in range(len(messages))}
    thinking = [index for index, message in enumerate(messages) if any(_thinking(message))]
    marked = [
        message | dict.fromkeys(_thinking_keys(message), marks[index]) if index in thinking else message
        for index, message in enumerate(messages)
    ]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        marked_text = str(tokenizer.apply_chat_template(marked, tokenize=False)) if thinking else ""
    except (TemplateError, TypeError) as error:  # a TypeError where the template adds up a text and a list
        raise ValueError(
            f"{where}: the chat template refuses the chat ({error}); mend the row or leave it out"
        ) from error
    return RenderedChat(text, len(thinking), sum(marks[index] not in marked_text for index in thinking))


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thinking stands under both names that templates read; newer transformers see to that as well."""
    thought = next((message[key] for key in THINKING_KEYS if key in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _thinking_keys(message: dict[str, Any]) -> list[str]:
    return [key for key in THINKING_KEYS if key in message]


def _thinking(message: dict[str, Any]) -> list[str]:
    return [str(message[key]).strip() for key in _thinking_keys(message)]


def shortened(value: Any) -> str:
    """A value for an error message, in no more than 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
