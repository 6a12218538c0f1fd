"""Rows of a data set to token sequences: what `datasets.map` runs, and what is counted on the way."""

from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from .chat import chat_key, read_messages, render_chat
from .corpus import CORPUS_FEATURES, document_hash, lines_with_separator, text_tokens, with_boundaries

# a sequence, and at the first one of each document what is counted of it
COUNTED_FEATURES = Features(
    {**CORPUS_FEATURES}
    | {
        name: Value("int32")
        for name in ("document_tokens", "dropped_tokens", "thinking", "thinking_dropped", "separator_lines")
    }
)
QUANTILES = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}


class Document(NamedTuple):
    """One row of a data set that is not empty."""

    text: str
    key: str
    """What its hash is taken of."""
    where: str
    """Names the row in an error."""
    thinking: int = 0
    thinking_dropped: int = 0
    separator_lines: int = 0


class SequenceMaker:
    """Turns batches of rows into sequences (`COUNTED_FEATURES`), in order; empty rows give none.

    A text gets BOS and EOS, as far as the tokenizer has them; words in it that look like control tokens are read as
    plain text. A chat is what the chat template renders, and nothing is added: the template writes the control tokens
    that the model knows.

    Args:
        tokenizer: of the subject.
        column: the one that is read.
        is_chat: whether it holds messages, not text.
        max_length: tokens of a sequence; None: a document is one sequence.
        keep_rest: whether what is beyond `max_length` becomes further sequences of the document, in order and with
            the same `document`. Where the document begins with BOS, so does each of them, within `max_length`.
        context: positions of the subject, which documents must fit where there is no max_length; None: unbounded.

    Raises:
        ValueError: when called, for a row of another kind, a chat that the template refuses, or a document that does
            not fit the context, naming the row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        column: str,
        *,
        is_chat: bool = False,
        max_length: int | None = None,
        keep_rest: bool = False,
        context: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.column = column
        self.is_chat = is_chat
        self.max_length = max_length
        self.keep_rest = keep_rest
        self.context = context

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        read = self._chat if self.is_chat else self._text
        found = [read(value, index) for value, index in zip(batch[self.column], indices, strict=True)]
        documents = [document for document in found if document is not None]
        rows: dict[str, list[Any]] = {name: [] for name in COUNTED_FEATURES}
        if not documents:
            return rows
        texts = [document.text for document in documents]
        if self.is_chat:
            token_lists = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            token_lists = text_tokens(texts, self.tokenizer)
        for document, ids in zip(documents, token_lists, strict=True):
            if ids:
                self._add(rows, document, ids if self.is_chat else with_boundaries(ids, self.tokenizer))
        return rows

    def _add(self, rows: dict[str, list[Any]], document: Document, ids: list[int]) -> None:
        """Adds a document's sequences; what is counted of the document stands at its first one."""
        if self.max_length is None and self.context is not None and len(ids) > self.context:
            raise ValueError(
                f"{document.where} has {len(ids)} tokens, beyond the subject's context of {self.context}; pass e.g. "
                f"--max_length {self.context}"
            )
        sequences = self._split(ids) if self.keep_rest else [ids[: self.max_length]]
        counted = {
            "document_tokens": len(ids),
            "dropped_tokens": 0 if self.keep_rest else len(ids) - len(sequences[0]),
            "thinking": document.thinking,
            "thinking_dropped": document.thinking_dropped,
            "separator_lines": document.separator_lines,
        }
        rows["input_ids"] += sequences
        rows["document"] += [document_hash(document.key)] * len(sequences)
        for name, value in counted.items():
            rows[name] += [value, *[0] * (len(sequences) - 1)]

    def _split(self, ids: list[int]) -> list[list[int]]:
        """All of a document's tokens as sequences of at most `max_length`, each with the BOS that the document has."""
        start = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        bos, rest = ids[:start], ids[start:]
        length = (self.max_length or len(ids)) - start
        if not rest:
            return [ids]
        return [bos + rest[first : first + length] for first in range(0, len(rest), length)]

    def _text(self, value: Any, index: int) -> Document | None:
        where = f"text_column: row {index} of {self.column!r}"
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where} holds {type(value).__name__}, not text; pass a column of texts")
        if not value or not value.strip():
            return None
        return Document(value, value, where, separator_lines=lines_with_separator(value))

    def _chat(self, value: Any, index: int) -> Document | None:
        where = f"messages_column: row {index} of {self.column!r}"
        messages = read_messages(value, where)
        if not messages:
            return None
        chat = render_chat(self.tokenizer, messages, where)
        if not chat.text.strip():
            return None
        return Document(chat.text, chat_key(messages), where, chat.thinking, chat.thinking_dropped)


def count(sequences: Dataset, num_rows: int) -> dict[str, Any]:
    """What a person wants to know of the tokenised documents; lengths are in tokens, before they were cut.

    Args:
        sequences: with `COUNTED_FEATURES`, as `datasets.map` made them.
        num_rows: of the data set.
    """
    columns = {name: sequences.data.column(name).to_numpy() for name in COUNTED_FEATURES if name != "input_ids"}
    lengths = columns["document_tokens"][columns["document_tokens"] > 0]
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    return {
        "rows": num_rows,
        "skipped_empty": num_rows - len(lengths),
        "documents": len(lengths),
        "repeated": len(lengths) - len(np.unique(columns["document"])),
        "truncated": int((columns["dropped_tokens"] > 0).sum()),
        "dropped_tokens": int(columns["dropped_tokens"].sum()),
        "document_tokens": {name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)}
        | {"mean": float(lengths.mean())},
        "thinking": int(columns["thinking"].sum()),
        "thinking_dropped": int(columns["thinking_dropped"].sum()),
        "separator_lines": int(columns["separator_lines"].sum()),
    }
