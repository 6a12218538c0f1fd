"""The data that a tuned lens is fitted on: documents packed end to end into blocks of tokens, kept as files.

The folder holds `train.npy` and `validation.npy`, (N, seq_len) int32, which are memory-mapped, and `blocks.json`: the
settings that they were made with, and what provenance says of them. The last one is written last, so blocks that it
stands beside are whole.
"""

import hashlib
import json
import logging
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..atomic_write import atomic_file, write_json
from ..context_length import context_length
from ..data.dataset_reading import local_hash
from ..data.tokenized_corpus import SPLITS, read_tokenization
from ..fingerprints import tokenizer_hash, weights_hash
from .token_arguments import SEQ_LEN, TokenArguments
from .token_stream import TRAIN, VALIDATION, TokenSequence, open_token_stream

logger = logging.getLogger(__name__)

FORMAT = 1
BLOCKS_FILE = "blocks.json"
MIN_BLOCKS = 16  # to train on, where there is less text than was asked for


class TokenBlocks(NamedTuple):
    """What a tuned lens is fitted on."""

    train: np.ndarray
    """Tokens, (N, seq_len) int32, memory-mapped and read-only."""
    validation: np.ndarray
    """Tokens of other documents, likewise."""
    description: dict[str, Any]
    """The `dataset` of the provenance: `repo_id, name, split, revision, sample_description, content_hash`; beside
    them `seq_len`, and of each split `documents` and `tokens`, counted."""


def read_token_blocks(
    args: TokenArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    folder: Path,
    seed: int = 316,
    state: PartialState | None = None,
    progress: bool = True,
) -> TokenBlocks:
    """The blocks of the arguments; made by the first process of `state`, unless those of the same settings are there.

    Documents are read in order until there are as many tokens as were asked for, and no more. They are packed from
    left to right, without anything between them but what their tokenizing adds; a document may go on in the next
    block, after a BOS if each is to start with one. Held-out documents are packed apart. The same arguments and data
    give the same bytes.

    Args:
        model, tokenizer: of the subject; the model runs only where it writes the text.
        name: Hub id or folder of the subject.
        folder: of the files; blocks of other settings in it are replaced.
        seed: of what the model writes.

    Raises:
        ValueError: if the data set cannot be read, there is too little text, `seq_len` is beyond the context, or
            the tokenizer starts no text with the BOS that is asked for.
        HubError: if the Hub cannot be reached, or fails.
    """
    if state is None or state.is_main_process:
        settings = _settings(args, model, tokenizer, seed)
        if not _holds_blocks(folder, settings):
            (folder / BLOCKS_FILE).unlink(missing_ok=True)
            description = _write_blocks(args, model, tokenizer, name, folder, seed, settings["seq_len"], progress)
            write_json(folder / BLOCKS_FILE, {"settings": settings, "dataset": description})
    if state is not None:
        state.wait_for_everyone()
    return open_token_blocks(folder)


def open_token_blocks(folder: Path) -> TokenBlocks:
    """The blocks that lie in a folder.

    Raises:
        ValueError: if there are none, or they are damaged.
    """
    file = folder / BLOCKS_FILE
    if not file.is_file():
        raise ValueError(f"blocks: none in {str(folder)!r}; fit a lens, which makes them")
    description = json.loads(file.read_text(encoding="utf-8"))["dataset"]
    parts = {}
    for split in SPLITS:
        shape = (description["tokens"][split] // description["seq_len"], description["seq_len"])
        try:
            parts[split] = np.lib.format.open_memmap(folder / f"{split}.npy", mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"blocks: cannot read {split}.npy in {str(folder)!r} ({error}); delete it") from error
        if parts[split].shape != shape:
            raise ValueError(
                f"blocks: {split}.npy in {str(folder)!r} is {parts[split].shape} instead of {shape}; delete it"
            )
    return TokenBlocks(parts[TRAIN], parts[VALIDATION], description)


def block_length(args: TokenArguments, model: PreTrainedModel) -> int:
    """Tokens of a block: `seq_len`, or the model's context where that is less than the default.

    Raises:
        ValueError: if another `seq_len` was asked for that is beyond the context.
    """
    context = context_length(model.config)
    if context is None or args.seq_len <= context:
        return args.seq_len
    if args.seq_len != SEQ_LEN:
        raise ValueError(f"seq_len: got {args.seq_len}, beyond the model's context of {context}; lower it")
    return context


def sample_length(args: TokenArguments, model: PreTrainedModel) -> int:
    """The most tokens of a document that the model writes: a block's, or more where blocks begin anywhere in one."""
    length = block_length(args, model)
    if not args.bos_per_sequence:
        return length
    return max(length, min(SEQ_LEN, context_length(model.config) or SEQ_LEN))


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The BOS that the tokenizer starts a text with.

    Raises:
        ValueError: if it starts none with it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("")["input_ids"][:1] != [bos]:
        raise ValueError(
            "bos_per_sequence: this tokenizer starts no text with a BOS, so prompts have none; leave it out"
        )
    return bos


def _settings(
    args: TokenArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Any]:
    """All that decides the blocks, but for the commit of a data set on the Hub, which may move."""
    return {
        "format": FORMAT,
        **asdict(args),
        "seq_len": block_length(args, model),
        "content": _content(args, model, seed),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        # the hash does not know of these
        "added_tokens": tokenizer("")["input_ids"],
    }


def _content(args: TokenArguments, model: PreTrainedModel, seed: int) -> str | None:
    """What tells the text from another under the same name; None for a data set on the Hub."""
    if args.is_sampled:
        return f"seed {seed} of {weights_hash(model)}"
    return read_tokenization(args.dataset)["fingerprint"] if args.is_tokenized else local_hash(args.dataset)


def _holds_blocks(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether whole blocks of these settings lie in the folder."""
    file = folder / BLOCKS_FILE
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["settings"] != settings:
        return False
    try:
        open_token_blocks(folder)
    except ValueError as error:
        logger.warning("%s; they are made anew", error)
        return False
    return True


class BlockWriter:
    """Lays tokens end to end into the blocks of an `.npy` file, from left to right, until there are enough.

    Args:
        file: opened for writing; its header is right after `finish`.
        seq_len: tokens of a block.
        max_blocks: when it has so many, it takes no more.
        bos: what every block starts with; None for nothing.

    Attributes:
        blocks: how many are written.
        documents: how many different ones there are tokens of, where those of one document come one after the other.
        digest: sha256 over their hashes, in order.
    """

    def __init__(self, file: BinaryIO, seq_len: int, max_blocks: int, bos: int | None = None) -> None:
        self.file = file
        self.seq_len = seq_len
        self.max_blocks = max_blocks
        self.bos = bos
        self.blocks = 0
        self.documents = 0
        self.digest = hashlib.sha256()
        self._document: int | None = None
        self._rest = np.empty(0, dtype="<i4")
        self._write_header()

    @property
    def is_full(self) -> bool:
        return self.blocks == self.max_blocks

    @property
    def tokens(self) -> int:
        """Those in blocks, with the BOS that they start with."""
        return self.blocks * self.seq_len

    def add(self, sequence: TokenSequence) -> None:
        """Takes a sequence, as much of it as there is room for."""
        if self.is_full or len(sequence.ids) == 0:
            return
        if sequence.document != self._document:
            self._document = sequence.document
            self.documents += 1
            self.digest.update(sequence.document.to_bytes(8, "little"))
        tokens = np.concatenate([self._rest, sequence.ids.astype("<i4", copy=False)])
        used = 0
        while not self.is_full and used < len(tokens):
            # a document that begins here has one already
            start = [] if self.bos is None or tokens[used] == self.bos else [self.bos]
            end = used + self.seq_len - len(start)
            if end > len(tokens):
                break
            self.file.write(np.concatenate([np.array(start, dtype="<i4"), tokens[used:end]]).tobytes())
            self.blocks += 1
            used = end
        self._rest = tokens[used:]

    def finish(self) -> None:
        """Writes the number of blocks, which is known now, into the header."""
        self.file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # numpy leaves room in it for the first axis to grow
        header = {"descr": "<i4", "fortran_order": False, "shape": (self.blocks, self.seq_len)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _write_blocks(
    args: TokenArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    folder: Path,
    seed: int,
    seq_len: int,
    progress: bool,
) -> dict[str, Any]:
    """Writes both files and returns their description."""
    budget = {TRAIN: args.tokens, VALIDATION: args.validation_tokens or 0}
    bos = bos_of(tokenizer) if args.bos_per_sequence else None
    with ExitStack() as stack:
        writers = {
            split: BlockWriter(
                stack.enter_context(atomic_file(folder / f"{split}.npy")), seq_len, -(-tokens // seq_len), bos
            )
            for split, tokens in budget.items()
        }
        source = open_token_stream(
            args, model, tokenizer, name, sample_length(args, model), seed,
            wanted=lambda split: not writers[split].is_full,
        )  # fmt: skip
        total = sum(writer.max_blocks for writer in writers.values()) * seq_len
        with tqdm(total=total, desc="packing", unit="token", unit_scale=True, disable=not progress) as bar:
            for sequence in stack.enter_context(closing(source.sequences)):
                writers[sequence.split].add(sequence)
                bar.update(sum(writer.tokens for writer in writers.values()) - bar.n)
                if all(writer.is_full for writer in writers.values()):
                    break
        _check_enough(args, writers)
        for writer in writers.values():
            writer.finish()
    packed = f"packed to {seq_len}" + (", each with BOS" if args.bos_per_sequence else "")
    digests = b"".join(writer.digest.digest() for writer in writers.values())
    return source.facts | {
        "sample_description": f"{source.facts['sample_description']}; {packed}",
        # over the hashes of the documents that were used, in order
        "content_hash": hashlib.sha256(digests).hexdigest(),
        "seq_len": seq_len,
        "documents": {split: writer.documents for split, writer in writers.items()},
        "tokens": {split: writer.tokens for split, writer in writers.items()},
    }


def _check_enough(args: TokenArguments, writers: dict[str, BlockWriter]) -> None:
    """Raises a ValueError if there was too little text, and warns if there was less than was asked for."""
    train, validation = writers[TRAIN], writers[VALIDATION]
    needed = min(MIN_BLOCKS, train.max_blocks)
    if train.blocks < needed:
        raise ValueError(
            f"dataset: {args.dataset!r} has too little text: {train.documents} documents to fit on fill "
            f"{train.blocks} sequences of seq_len {train.seq_len}, and {needed} are needed; add text or lower seq_len"
        )
    if validation.blocks == 0:
        raise ValueError(
            f"dataset: the {validation.documents} held-out documents of {args.dataset!r} do not fill one sequence of "
            f"seq_len {validation.seq_len}; add documents, raise validation_fraction or lower seq_len"
        )
    for split, writer in writers.items():
        if not writer.is_full:
            logger.warning(
                "%r has less text than was asked for: %d tokens instead of %d (%s)",
                *(args.dataset, writer.tokens, writer.max_blocks * writer.seq_len, split),
            )
