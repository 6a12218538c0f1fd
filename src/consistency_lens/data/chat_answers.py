"""Finished answers of a chat model on disk: appended as they come, found after a kill, put in order at the end."""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..atomic_write import atomic_file
from .chat_client import Completion, PromptFailedError
from .chat_prompts import Prompt

MESSAGES_FILE, PARQUET_FILE = "messages.jsonl", "messages.parquet"
TRUNCATED_FILE, FAILURES_FILE = "truncated.jsonl", "failures.jsonl"
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
TOKEN_COUNTS = ("prompt", "completion", "thinking")
ROWS_PER_GROUP = 1000
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "thinking": pa.string()})),
        "finish_reason": pa.string(),
        **{f"{name}_tokens": pa.int64() for name in TOKEN_COUNTS},
    }
)

Row = dict[str, Any]


class AnswerFiles:
    """The answers of a folder, those that are there and those to come: a context manager.

    Args:
        folder: of the answers.
        prompts: whose answers they are.
        drop_truncated: whether answers cut at the token limit go to their own file.

    Attributes:
        added: answers of this run.
        added_tokens: their completion tokens, as far as the server counts them.
        failed: prompts that this run gave up.

    Raises:
        ValueError: if the folder holds an answer to none of these prompts, or a line that is no answer.
    """

    def __init__(self, folder: Path, prompts: Sequence[Prompt], drop_truncated: bool) -> None:
        self.folder, self.prompts, self.drop_truncated = folder, prompts, drop_truncated
        self.added = self.added_tokens = self.failed = 0
        self._files: dict[str, FileIO] = {}
        self._stack = ExitStack()
        self._places: dict[str, tuple[str, int]] = {}
        by_id = {prompt.id: prompt for prompt in prompts}
        for name in (MESSAGES_FILE, TRUNCATED_FILE):
            for offset, row in read_lines(folder / name):
                if row["id"] not in by_id or row["messages"][:-1] != by_id[row["id"]].messages:
                    raise ValueError(
                        f"output_dir: {str(folder / name)!r} has an answer to a prompt that is not among the "
                        f"{len(prompts)} now given (id {row['id']!r}); choose another folder, or give that one too"
                    )
                # Of two answers to one prompt, as two runs at a time would leave them, the first is kept.
                self._places.setdefault(row["id"], (name, offset))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def waiting(self) -> list[Prompt]:
        """The prompts that have no answer yet."""
        return [prompt for prompt in self.prompts if prompt.id not in self._places]

    def add(self, prompt: Prompt, completion: Completion) -> Row:
        """Keeps an answer; returns its row."""
        answer = {"role": "assistant", "content": completion.content}
        if completion.thinking is not None:
            answer["thinking"] = completion.thinking
        row = {
            "id": prompt.id,
            "messages": [*prompt.messages, answer],
            "finish_reason": completion.finish_reason,
            **{f"{name}_tokens": getattr(completion, f"{name}_tokens") for name in TOKEN_COUNTS},
        }
        name = TRUNCATED_FILE if completion.truncated and self.drop_truncated else MESSAGES_FILE
        self._places[prompt.id] = (name, self._append(name, row))
        self.added += 1
        self.added_tokens += completion.completion_tokens or 0
        return row

    def fail(self, prompt: Prompt, error: PromptFailedError) -> None:
        """Keeps a prompt that was given up, and why."""
        self.failed += 1
        row = {"id": prompt.id, "messages": prompt.messages, "error": str(error), "tries": error.tries}
        self._append(FAILURES_FILE, row)

    def _append(self, name: str, row: Row) -> int:
        if name not in self._files:
            # Failures are those of one run. Unbuffered: what was written outlives this process.
            file = FileIO(self.folder / name, "wb" if name == FAILURES_FILE else "ab")
            self._files[name] = self._stack.enter_context(file)
        return append_line(self._files[name], row)

    def rows(self, name: str) -> Iterator[Row]:
        """The answers in one of the files, in the order of the prompts, one at a time in memory."""
        places = (self._places.get(prompt.id) for prompt in self.prompts)
        offsets = [place[1] for place in places if place is not None and place[0] == name]
        if offsets:
            with open(self.folder / name, "rb") as file:
                for offset in offsets:
                    file.seek(offset)
                    yield json.loads(file.readline())

    def finish(self) -> None:
        """Writes the answers in the order of the prompts, as parquet and as JSON lines. Nothing can be added then."""
        self._stack.close()
        if not self.failed:
            (self.folder / FAILURES_FILE).unlink(missing_ok=True)
        with atomic_file(self.folder / PARQUET_FILE) as stream, pq.ParquetWriter(stream, SCHEMA) as writer:
            rows = self.rows(MESSAGES_FILE)
            while group := list(islice(rows, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
        for name in (MESSAGES_FILE, TRUNCATED_FILE):
            if (self.folder / name).exists():
                with atomic_file(self.folder / name) as stream:
                    stream.writelines(json_line(row) for row in self.rows(name))


def read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Offset and content of each line of a file of answers; a half line at the end, left by a kill, is cut off.

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
            if not isinstance(row, dict) or row.keys() != set(SCHEMA.names):
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


def statistics_of(answers: AnswerFiles) -> dict[str, Any]:
    """Counts and token lengths of all answers, whichever run they come from."""
    counts: Counter[str] = Counter()
    finish_reasons: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {name: [] for name in TOKEN_COUNTS}
    for file in (MESSAGES_FILE, TRUNCATED_FILE):
        for row in answers.rows(file):
            counts["answers" if file == MESSAGES_FILE else "dropped"] += 1
            counts["truncated"] += row["finish_reason"] == "length"
            counts["with_thinking"] += "thinking" in row["messages"][-1]
            finish_reasons[row["finish_reason"]] += 1
            for name, found in lengths.items():
                if row[f"{name}_tokens"] is not None:
                    found.append(row[f"{name}_tokens"])
    return {
        "prompts": len(answers.prompts),
        **{name: counts[name] for name in ("answers", "truncated", "dropped", "with_thinking")},
        "failed": answers.failed,
        "finish_reasons": dict(finish_reasons),
        "tokens": {name: length_statistics(found) for name, found in lengths.items() if found},
    }


def length_statistics(lengths: Sequence[int]) -> Mapping[str, int | float]:
    """Number, sum, mean, extremes and `QUANTILES` of token counts."""
    values = np.asarray(lengths)
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {
        "count": len(values),
        "total": int(values.sum()),
        "mean": float(values.mean()),
        "min": int(values.min()),
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
        "max": int(values.max()),
    }
