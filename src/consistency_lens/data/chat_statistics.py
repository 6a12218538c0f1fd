"""Counts and token lengths of a chat model's answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .chat_answers import AnswerFiles, Row
from .chat_prompts import SYSTEM_ROLES


def statistics_of(
    answers: AnswerFiles,
    drop_truncated: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    disable_tqdm: bool = True,
) -> dict[str, Any]:
    """Counts and token lengths of all answers, whichever run they come from.

    Lengths are by who counts them: the server, a conversation as its chat template renders it, and the tokenizer, the
    texts alone. Under each stand the parts of an example, as `server_counts` and `text_counts` name them.

    Args:
        drop_truncated: whether the data set leaves out the answers cut at the token limit.
        tokenizer: counts the texts beside the server; this takes a while.
    """
    number = truncated = with_thinking = 0
    lengths: dict[str, dict[str, list[int]]] = {"server": {}, "tokenizer": {}}
    total = len(answers.prompts) - len(answers.waiting())
    for row in tqdm(answers.rows(), total=total, desc="token lengths", unit="answer", disable=disable_tqdm):
        number += 1
        truncated += row["finish_reason"] == "length"
        with_thinking += "thinking" in row["messages"][-1]
        counts = {"server": server_counts(row)}
        if tokenizer is not None:
            counts["tokenizer"] = text_counts(row["messages"], tokenizer)
        for counter, found in counts.items():
            for part, count in found.items():
                lengths[counter].setdefault(part, []).append(count)
    return {
        "prompts": len(answers.prompts),
        "answers": number,
        "with_thinking": with_thinking,
        "truncated": truncated,
        "dropped": truncated if drop_truncated else 0,
        "failed": answers.failed,
        "skipped": answers.skipped,
        "tokens": {
            counter: {part: length_statistics(found) for part, found in parts.items()}
            for counter, parts in lengths.items()
            if parts
        },
    }


def server_counts(row: Row) -> dict[str, int]:
    """Tokens of the parts of one example, as far as the server says; the completion is thinking and content."""
    completion, thinking = row["completion_tokens"], row["thinking_tokens"]
    if thinking is None and "thinking" not in row["messages"][-1]:
        thinking = 0
    content = None if completion is None or thinking is None else completion - thinking
    counts = {"prompt_and_system": row["prompt_tokens"], "thinking": thinking or None, "content": content}
    counts["completion"] = completion
    return {part: count for part, count in counts.items() if count is not None}


def text_counts(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens of the texts of one example, without those of a chat template."""
    *asked, answer = messages
    lengths = [len(tokenizer.encode(message["content"], add_special_tokens=False)) for message in asked]
    counts = {
        "prompt": sum(
            length for message, length in zip(asked, lengths, strict=True) if message["role"] not in SYSTEM_ROLES
        ),
        "prompt_and_system": sum(lengths),
    }
    for part in ("thinking", "content"):
        if part in answer:
            counts[part] = len(tokenizer.encode(answer[part], add_special_tokens=False))
    return counts


def length_statistics(lengths: Sequence[int]) -> dict[str, int | float]:
    """Number, mean, median, 95% quantile and maximum of token counts."""
    return {
        "count": len(lengths),
        "mean": float(np.mean(lengths)),
        "median": float(np.median(lengths)),
        "p95": float(np.quantile(lengths, 0.95)),
        "max": max(lengths),
    }
