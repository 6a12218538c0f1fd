"""Finished answers of a chat model on disk: appended as they come, found after a kill, put in order at the end."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ..atomic_write import atomic_file
from .chat_client import Completion, PromptFailedError
from .chat_prompts import Prompt

ANSWERS_FILE, FAILURES_FILE = "answers.jsonl", "failures.jsonl"
MESSAGES_FILE, PARQUET_FILE = "messages.jsonl", "train/messages.parquet"
ANSWER_KEYS = ("id", "messages", "finish_reason", "prompt_tokens", "completion_tokens", "thinking_tokens")
SCHEMA = pa.schema(
    {"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "thinking": pa.string()}))}
)
ROWS_PER_GROUP = 1000

Row = dict[str, Any]


class AnswerFiles:
    """The answers of a folder, those that are there and those to come: a context manager.

    Args:
        folder: of the answers.
        prompts: whose answers they are. Answers to other prompts stay in the log and play no part.

    Attributes:
        added: answers of this run.
        added_tokens: their completion tokens, as far as the server counts them.
        failed: prompts that this run gave up after several tries.
        skipped: prompts that the server refused in this run.

    Raises:
        ValueError: if the log has a line that is no answer, or the answer to another prompt of the same id.
    """

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        self.folder, self.prompts = folder, prompts
        self.added = self.added_tokens = self.failed = self.skipped = 0
        self._files: dict[str, FileIO] = {}
        self._stack = ExitStack()
        self._offsets: dict[str, int] = {}
        by_id = {prompt.id: prompt for prompt in prompts}
        for offset, row in read_answers(folder / ANSWERS_FILE):
            prompt = by_id.get(row["id"])
            if prompt is None:
                continue
            if row["messages"][:-1] != prompt.messages:
                raise ValueError(
                    f"output_dir: {str(folder)!r} has the answer to another prompt whose id is {prompt.id!r} too; "
                    "choose another folder"
                )
            self._offsets[prompt.id] = offset

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def waiting(self) -> list[Prompt]:
        """The prompts that have no answer yet."""
        return [prompt for prompt in self.prompts if prompt.id not in self._offsets]

    def add(self, prompt: Prompt, completion: Completion) -> Row:
        """Keeps an answer; returns its row."""
        answer = {"role": "assistant", "content": completion.content}
        if completion.thinking is not None:
            answer["thinking"] = completion.thinking
        counts = (completion.prompt_tokens, completion.completion_tokens, completion.thinking_tokens)
        values = (prompt.id, [*prompt.messages, answer], completion.finish_reason, *counts)
        row = dict(zip(ANSWER_KEYS, values, strict=True))
        self._offsets[prompt.id] = self._append(ANSWERS_FILE, row)
        self.added += 1
        self.added_tokens += completion.completion_tokens or 0
        return row

    def fail(self, prompt: Prompt, error: PromptFailedError) -> None:
        """Keeps a prompt that was given up, and why."""
        self.failed += not error.refused
        self.skipped += error.refused
        row = {"id": prompt.id, "messages": prompt.messages, "error": str(error), "tries": error.tries}
        self._append(FAILURES_FILE, row)

    def rows(self) -> Iterator[Row]:
        """The answers in the order of the prompts, one at a time in memory."""
        offsets = [self._offsets[prompt.id] for prompt in self.prompts if prompt.id in self._offsets]
        if offsets:
            with open(self.folder / ANSWERS_FILE, "rb") as file:
                for offset in offsets:
                    file.seek(offset)
                    yield json.loads(file.readline())

    def write_messages(self, drop_truncated: bool = False) -> None:
        """Writes the conversations, in the order of the prompts, as parquet and as JSON lines.

        Args:
            drop_truncated: leave out those whose answer was cut at the token limit.
        """
        if not self.failed + self.skipped:
            (self.folder / FAILURES_FILE).unlink(missing_ok=True)
        with (
            atomic_file(self.folder / MESSAGES_FILE) as lines,
            atomic_file(self.folder / PARQUET_FILE) as stream,
            pq.ParquetWriter(stream, SCHEMA) as writer,
        ):
            rows = (
                {"messages": row["messages"]}
                for row in self.rows()
                if not (drop_truncated and row["finish_reason"] == "length")
            )
            while group := list(islice(rows, ROWS_PER_GROUP)):
                lines.writelines(json_line(row) for row in group)
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))

    def _append(self, name: str, row: Row) -> int:
        if name not in self._files:
            # Failures are those of one run. Unbuffered: what was written outlives this process.
            file = FileIO(self.folder / name, "wb" if name == FAILURES_FILE else "ab")
            self._files[name] = self._stack.enter_context(file)
        return append_line(self._files[name], row)


def read_answers(path: Path) -> Iterator[tuple[int, Row]]:
    """Offset and content of each line of a log of answers; a half line at the end, left by a kill, is cut off.

    Raises:
        ValueError: for a line that is no answer.
    """
    if not path.exists():
        return
    offset = 0
    with open(path, "rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or row.keys() != set(ANSWER_KEYS):
                raise ValueError(
                    f"output_dir: line {number} of {str(path)!r} is no answer; take it out, or choose another folder"
                )
            yield offset, row
            offset += len(line)
        file.truncate(offset)


def append_line(file: FileIO, row: Row) -> int:
    """Appends a row to an unbuffered file, whole or, if the disk is full, not at all; returns its offset in bytes."""
    start, line = file.seek(0, os.SEEK_END), json_line(row)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    except OSError:
        file.truncate(start)
        raise
    return start


def json_line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
