"""Documents as tokens, in order and one at a time, from wherever a tuned lens is fitted: what `token_blocks` packs."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.activation_cache import token_lists
from ..data.corpus import document_hash, is_validation_document, lines_with_separator, warn_of_separators
from ..data.dataset_reading import cause_of, check_name, stream_dataset
from ..data.generation import sample_documents
from ..data.tokenized_corpus import SPLITS, corpus_origin, open_corpus
from ..hub_connection import HubError, asking_hub
from .token_arguments import TokenArguments

TRAIN, VALIDATION = SPLITS
TEXT_BATCH = 256  # documents that are tokenised together
CORPUS_BATCH = 1000
SAMPLE_BATCH = 64  # documents that are sampled side by side


class TokenSequence(NamedTuple):
    """A document, or a part of one."""

    split: str
    """`train` or `validation`."""
    document: int
    """Its hash."""
    ids: np.ndarray
    """Tokens, (n,) int32."""


class TokenStream(NamedTuple):
    """Where tokens come from."""

    sequences: Generator[TokenSequence]
    """To be closed after use."""
    facts: dict[str, Any]
    """What provenance says of the source."""


def open_token_stream(
    args: TokenArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    sample_length: int,
    seed: int,
    wanted: Callable[[str], bool],
) -> TokenStream:
    """The documents that the arguments name, as tokens, in order.

    Args:
        model, tokenizer: of the subject; the model runs only where it writes the text.
        name: of the subject.
        sample_length: the most tokens of a document that the model writes.
        seed: of what the model writes.
        wanted: whether tokens of a split are still to come; documents of the other are passed over.

    Raises:
        ValueError: if the data set cannot be read or lacks the column, or the corpus is another tokenizer's.
        HubError: if the Hub cannot be reached, or fails.
    """
    if args.is_sampled:
        facts: dict[str, Any] = {"repo_id": f"samples of {name}", "name": None, "split": None, "revision": None}
        told = f"written by the model at temperature 1, seed {seed}, at most {sample_length} tokens a document"
        sequences = sampled_sequences(model, tokenizer, sample_length, seed, args.validation_fraction)
        return TokenStream(sequences, facts | {"sample_description": told})
    if args.is_tokenized:
        origin = corpus_origin(args.dataset, tokenizer, name)
        facts = {"repo_id": origin.name, "revision": origin.revision, "corpus": origin.facts}
        facts |= {"name": origin.facts["dataset_config"], "split": origin.facts["dataset_split"]}
        told = "tokenized before with model tokenizer, by consistency-lens tokenize"
        return TokenStream(corpus_sequences(args.dataset, wanted), facts | {"sample_description": told})
    commit = None if Path(args.dataset).exists() else pinned_commit(args.dataset, args.dataset_revision)
    dataset = stream_dataset(args.dataset, args.dataset_config, args.dataset_split, commit)
    facts = {
        "repo_id": args.dataset,
        "name": args.dataset_config,
        "split": args.dataset_split,
        "revision": args.dataset_revision,
        "commit": commit,
        "sample_description": "streamed; tokenized with model tokenizer",
    }
    return TokenStream(text_sequences(dataset, args, tokenizer, wanted), facts)


def pinned_commit(dataset: str, revision: str | None) -> str | None:
    """The commit that a data set on the Hub is at.

    Raises:
        ValueError: if there is no such data set or revision.
        HubError: if the Hub cannot be reached, or fails.
    """
    try:
        with asking_hub(dataset, revision):
            return HfApi().dataset_info(dataset, revision=revision).sha
    except (ValueError, HubError) as error:
        raise type(error)(f"dataset: there is no file or folder {dataset!r} here; {error}") from error


def text_sequences(
    dataset: Dataset | IterableDataset,
    args: TokenArguments,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Callable[[str], bool],
) -> Generator[TokenSequence]:
    """Each text with the control tokens that the tokenizer itself adds; empty ones are left out.

    A word in it that looks like a control token, such as `</s>`, is read as the characters that it is made of.

    Raises:
        ValueError: for a row that is no text, or data that cannot be read, or has no such column.
        HubError: if the Hub fails.
    """
    separator_lines = 0
    try:
        for texts in _text_batches(dataset, args):
            documents = [(document_hash(text), text) for text in texts]
            sided = [(_side(document, args.validation_fraction), document, text) for document, text in documents]
            chosen = [found for found in sided if wanted(found[0])]
            if not chosen:
                continue
            texts = [text for _, _, text in chosen]
            separator_lines += sum(lines_with_separator(text) for text in texts)
            # not verbose, for it warns of every text beyond the model's context
            tokens = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
            for (side, document, _), ids in zip(chosen, tokens, strict=True):
                yield TokenSequence(side, document, np.array(ids, dtype=np.int32))
    finally:  # of text that is longer than the budget, too
        warn_of_separators(separator_lines, args.dataset)


def _text_batches(dataset: Dataset | IterableDataset, args: TokenArguments) -> Iterator[list[str]]:
    """The texts that are not empty, some at a time."""
    row = 0
    for values in _column_batches(dataset, args):
        for index, value in enumerate(values, row):
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"text_column: row {index} of {args.text_column!r} holds {type(value).__name__}, not text; pass a "
                    "column of texts"
                )
        row += len(values)
        yield [value for value in values if value and value.strip()]


def _column_batches(dataset: Dataset | IterableDataset, args: TokenArguments) -> Iterator[list[Any]]:
    """The values of the column that is read, some at a time."""
    batches = dataset.iter(TEXT_BATCH)
    while True:
        with _reading(args.dataset):
            batch = next(batches, None)
        if batch is None:
            return
        check_name(args.text_column, list(batch), "text_column")
        yield batch[args.text_column]


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Makes one line of what goes wrong while rows come."""
    try:
        yield
    except Exception as error:  # every loader raises its own kinds
        if isinstance(error, ValueError) or Path(source).exists():
            raise ValueError(f"dataset: cannot read {source!r} ({cause_of(error)}); mend or replace it") from error
        with asking_hub(source):
            raise


def corpus_sequences(path: str, wanted: Callable[[str], bool]) -> Generator[TokenSequence]:
    """The sequences of a folder that `consistency-lens tokenize` made, first those to train on.

    Raises:
        ValueError: if it is damaged.
    """
    for split in SPLITS:
        for table in open_corpus(path, split).with_format("arrow").iter(CORPUS_BATCH):
            if not wanted(split):
                break
            for document, ids in zip(table["document"].to_pylist(), token_lists(table), strict=True):
                yield TokenSequence(split, document, ids)


def sampled_sequences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int, fraction: float
) -> Generator[TokenSequence]:
    """Documents that the model writes, each once; ends when it has no new one to give.

    Args:
        max_length: tokens of a document, start and EOS included.
        fraction: of the documents that are held out.

    Raises:
        ValueError: if the model cannot be sampled from: see `sample_documents`.
    """
    seen: set[int] = set()
    for batch in count():
        written = sample_documents(
            model,
            tokenizer,
            SAMPLE_BATCH,
            max_length,
            batch_size=SAMPLE_BATCH,
            seed=int(np.random.SeedSequence([seed, batch]).generate_state(1)[0]),
            progress=False,
        )
        new = [row for row in written if row["document"] not in seen]
        if not new:
            return
        for row in new:
            seen.add(row["document"])
            ids = np.array(row["input_ids"], dtype=np.int32)
            yield TokenSequence(_side(row["document"], fraction), row["document"], ids)


def _side(document: int, fraction: float) -> str:
    return VALIDATION if is_validation_document(document, fraction) else TRAIN
