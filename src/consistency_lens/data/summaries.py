"""Pairs of a context and a summary of it: rows whose text is given, for a warm start on words of the user's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..subject import Subject
from .corpus import document_hash
from .dataset_reading import LOADERS, cause_of

COLUMNS = ("context", "summary")


def read_summaries(source: str) -> Dataset:
    """Reads a data set with the text columns `context` and `summary`: a file, or the `train` split of a Hub id.

    Raises:
        ValueError: if it cannot be read, has other columns, or is empty, or if a text is missing.
    """
    path = Path(source)
    try:
        if path.suffix in LOADERS:
            dataset = load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
        else:
            dataset = load_dataset(source, split="train")
    except Exception as error:  # every loader raises its own kinds
        raise ValueError(
            f"summaries: cannot read {source!r}; pass a .jsonl, .csv or .parquet file ({cause_of(error)})"
        ) from error
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"summaries: {source!r} needs rows with the columns {' and '.join(COLUMNS)}, got {len(dataset)} with "
            f"{', '.join(dataset.column_names)}; rename them"
        )
    for name in COLUMNS:
        bad = [index for index, text in enumerate(dataset[name]) if not isinstance(text, str) or not text.strip()]
        if bad:
            raise ValueError(f"summaries: the {name} of row {bad[0]} is no text, or an empty one; leave the row out")
    return dataset.select_columns(list(COLUMNS))


class SummaryRows(torch.utils.data.Dataset):
    """The activation at the last token of each context, with the summary as its text.

    A row is as those of `data.activation_source.ActivationRows`, with `text_ids` beside it: the summary's tokens,
    which the collator puts in place of the context's tail.

    Args:
        pairs: from `read_summaries`.
        subject: gives the activations; they are held in memory, (N, d) float32.
        tokenizer: of the subject.
        max_length: tokens of a context, BOS included; of a longer one the end is kept.
        first_row: index of the first row, beyond those of the cache that these rows are mixed with: sampling noise
            belongs to it.
        batch_size: contexts in a pass of the subject.
    """

    def __init__(
        self,
        pairs: Dataset,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        first_row: int = 0,
        batch_size: int = 32,
    ) -> None:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        contexts, texts = (tokenizer(list(pairs[name]), add_special_tokens=False)["input_ids"] for name in COLUMNS)
        self.contexts = [bos + ids[-(max_length - len(bos)) :] for ids in contexts]
        self.texts = texts
        self.documents = [document_hash(context) for context in pairs["context"]]
        self.first_row = first_row
        self.activations = last_activations(subject, self.contexts, batch_size)

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "activation": self.activations[index],
            "input_ids": np.asarray(self.contexts[index]),
            "position": len(self.contexts[index]) - 1,
            "document": self.documents[index],
            "row": self.first_row + index,
            "text_ids": np.asarray(self.texts[index]),
        }


def last_activations(subject: Subject, contexts: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    """The activation (N, d), float32, at the last token of each context."""
    parts = []
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        longest = max(len(ids) for ids in batch)
        input_ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=subject.model.device)
        lengths = torch.tensor([len(ids) for ids in batch], device=input_ids.device)
        mask = (torch.arange(longest, device=input_ids.device) < lengths[:, None]).long()
        activations = subject.activations(input_ids, mask)
        parts.append(activations[torch.arange(len(batch)), lengths - 1].float().cpu())
    return torch.cat(parts).numpy()
