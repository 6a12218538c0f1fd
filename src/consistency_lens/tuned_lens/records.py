"""The record files of a sweep: one row a layer, position and prompt, the same columns for the norm and the tuned lens.

`<name>-records.csv` and `<name>-records-tuned.csv` hold all positions, `<name>-pure-next-token.csv` and its `-tuned`
twin the last position of each prompt alone. Where there is nothing to say, a cell is empty.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..atomic_write import atomic_file
from .kpis import RANKS, first_layer_within
from .readings import NORM, TUNED, LensReading, PromptResult

# lens -> how the names of its files end
ENDINGS = {NORM: "", TUNED: "-tuned"}
DIGITS = 9  # what a float32 is told apart by


@dataclass(frozen=True)
class Record:
    """What one lens reads at one layer and position. Probabilities and ranks are of the next token."""

    prompt_id: str
    prompt: str
    lens: str
    """"norm" or "tuned"."""
    layer: int
    """The block whose output is read, 0-based."""
    position: int
    """Index of the token, what the tokenizer puts before the text included."""
    token_id: int
    token: str
    """The token at this position, as text."""
    entropy_bits: float
    """Of the lens's distribution."""
    teacher_entropy_bits: float
    """Of the model's, P_final."""
    top20: list[list[Any]]
    """[token id, token, probability] of the likeliest tokens under the lens."""
    answer: str | None
    answer_id: int | None
    """The answer's first token."""
    answer_rank: int | None
    """1 = top; at the last position alone, as are the next two."""
    answer_probability: float | None
    is_answer: bool | None
    """Whether no token is likelier than the answer."""
    kl_from_final_bits: float
    """KL(P_final || P_layer), which the lens is fitted to and judged by."""
    kl_to_final_bits: float
    """KL(P_layer || P_final)."""
    cos_to_final: float
    """Cosine of this layer's and the final logits, both centred over the vocabulary."""
    first_rank_le_10: int | None
    """The first layer with the answer among the ten likeliest at the prompt's last position; the same in all rows of a
    prompt and lens."""
    first_rank_le_5: int | None
    first_rank_le_1: int | None


COLUMNS = tuple(field.name for field in fields(Record))


def first_ranks(reading: LensReading) -> dict[str, Any]:
    """The milestones of a prompt: the first layer with the answer among the n likeliest, by the columns' names."""
    ranks = reading.answer_rank
    return {f"first_rank_le_{n}": None if ranks is None else first_layer_within(ranks.numpy(), n) for n in RANKS}


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """Token id -> its text, each decoded once."""
    return cache(lambda token: str(tokenizer.decode([token])))


def records_of(result: PromptResult, lens: str, text_of: Callable[[int], str]) -> Iterator[Record]:
    """The records of one prompt and lens, layer by layer.

    Args:
        result: what was read.
        lens: "norm" or "tuned".
        text_of: of a token id; see `token_texts`.
    """
    reading, tokens = result.lenses[lens], result.tokens
    milestones, teacher_entropy = first_ranks(reading), result.teacher_entropy_bits.tolist()
    for layer in range(len(reading.entropy_bits)):
        # converted at once: an item at a time costs as much as the reading
        figures = [of[layer].tolist() for of in (reading.entropy_bits, reading.kl_from_final_bits)]
        figures += [of[layer].tolist() for of in (reading.kl_to_final_bits, reading.cos_to_final)]
        tops = zip(reading.top_ids[layer].tolist(), reading.top_probabilities[layer].tolist(), strict=True)
        for position, (entropy, kl_from, kl_to, cosine, top) in enumerate(zip(*figures, tops, strict=True)):
            is_last = position == len(tokens.ids) - 1
            yield Record(
                prompt_id=tokens.prompt.id,
                prompt=tokens.prompt.text,
                lens=lens,
                layer=layer,
                position=position,
                token_id=tokens.ids[position],
                token=text_of(tokens.ids[position]),
                entropy_bits=entropy,
                teacher_entropy_bits=teacher_entropy[position],
                top20=[[token, text_of(token), probability] for token, probability in zip(*top, strict=True)],
                answer=tokens.prompt.answer,
                answer_id=tokens.answer_id,
                kl_from_final_bits=kl_from,
                kl_to_final_bits=kl_to,
                cos_to_final=cosine,
                **_of_answer(reading, layer if is_last else None),
                **milestones,
            )


def file_names(name: str, lens: str) -> tuple[str, str]:
    """The files of a lens's records: of all positions, and of last positions."""
    return f"{name}-records{ENDINGS[lens]}.csv", f"{name}-pure-next-token{ENDINGS[lens]}.csv"


@contextmanager
def record_files(
    folder: Path, name: str, lenses: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Callable[[PromptResult], None]]:
    """Files that the results of one prompt after another are written to, and that are there when all are written.

    Yields:
        What writes a result.
    """
    text_of = token_texts(tokenizer)
    with ExitStack() as stack:
        writers = {
            lens: [stack.enter_context(_csv_file(folder / file)) for file in file_names(name, lens)] for lens in lenses
        }

        def write(result: PromptResult) -> None:
            last = len(result.tokens.ids) - 1
            for lens, (every, pure) in writers.items():
                for record in records_of(result, lens, text_of):
                    cells = [_cell(getattr(record, column)) for column in COLUMNS]
                    every.writerow(cells)
                    if record.position == last:
                        pure.writerow(cells)

        yield write


def read_records(path: str | Path) -> list[Record]:
    """Reads a record file back.

    Raises:
        ValueError: if there is none, or its columns are others.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"records: no file at {str(path)!r}; run consistency-lens tuned-lens sweep")
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        found = next(rows, [])
        if tuple(found) != COLUMNS:
            raise ValueError(f"records: {str(path)!r} has other columns ({', '.join(found)}) than a sweep writes")
        try:
            return [Record(**{c: PARSERS[c](cell) for c, cell in zip(COLUMNS, row, strict=True)}) for row in rows]
        except ValueError as error:
            raise ValueError(
                f"records: row {rows.line_num} of {str(path)!r} is broken ({error}); sweep anew"
            ) from error


def _of_answer(reading: LensReading, layer: int | None) -> dict[str, Any]:
    """The answer's columns, filled where a layer is given."""
    if layer is None or reading.answer_rank is None or reading.answer_probability is None:
        return {"answer_rank": None, "answer_probability": None, "is_answer": None}
    rank, probability = int(reading.answer_rank[layer]), float(reading.answer_probability[layer])
    return {"answer_rank": rank, "answer_probability": probability, "is_answer": rank == 1}


@contextmanager
def _csv_file(path: Path) -> Iterator[Any]:
    with atomic_file(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        yield writer
        text.detach()  # flushes, and leaves the file open for its atomic end


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    if isinstance(value, list):
        short = [[token, text, float(f"{probability:.{DIGITS}g}")] for token, text, probability in value]
        return json.dumps(short, ensure_ascii=False)
    return str(value)


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda cell: None if cell == "" else parse(cell)


def _parsers() -> Mapping[str, Callable[[str], Any]]:
    by_type: dict[Any, Callable[[str], Any]] = {
        str: str,
        int: int,
        float: float,
        list[list[Any]]: json.loads,
        str | None: _optional(str),
        int | None: _optional(int),
        float | None: _optional(float),
        bool | None: _optional(lambda cell: cell == "True"),
    }
    return {field.name: by_type[field.type] for field in fields(Record)}


PARSERS = _parsers()
