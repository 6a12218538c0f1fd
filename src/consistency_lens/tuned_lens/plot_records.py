"""The records of a sweep as the plots read them."""

import csv
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One layer at one position of one prompt."""

    prompt_id: str
    prompt: str
    lens: str
    layer: int
    position: int
    token_id: int
    token: str
    entropy_bits: float
    teacher_entropy_bits: float
    top20: list[tuple[int, str, float]]
    answer: str | None
    answer_id: int | None
    answer_rank: int | None
    answer_probability: float | None
    is_answer: bool | None
    kl_from_final_bits: float
    kl_to_final_bits: float
    cos_to_final: float
    first_rank_le_10: int | None
    first_rank_le_5: int | None
    first_rank_le_1: int | None


def read_records(path: Path) -> list[Record]:
    """The rows of a CSV file of records."""
    with open(path, encoding="utf-8", newline="") as file:
        return [Record(**{field.name: read(row[field.name], field.type) for field in fields(Record)})
                for row in csv.DictReader(file)]  # fmt: skip


def read(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if text == "":
        return None
    if kind == list[tuple[int, str, float]]:
        return [tuple(entry) for entry in json.loads(text)]
    if kind == bool | None:
        return text == "True"
    return (float if kind in (float, float | None) else str if kind == str | None else int)(text)
