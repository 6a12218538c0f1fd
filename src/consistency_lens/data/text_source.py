"""The text that a subject is read on: a corpus on disk, a text file, or documents that it writes itself."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset, load_from_disk
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from ..atomic_write import sync_folder
from ..fingerprints import tokenizer_hash, weights_hash
from ..subject import Subject
from .corpus import read_documents, tokenize_documents
from .generation import sample_documents
from .tokenized_corpus import SPLITS, corpus_origin, open_corpus

WHOLE = "all"


class Reader:
    """The model whose activations are read, and what tells it from others.

    Args:
        subject: at the layer that is read.
        tokenizer: of the subject.
        name, revision: Hub id or folder of the subject, and its commit.
        known_hash: the hash of its weights where that is known, as they were loaded when a lens was trained.
    """

    def __init__(
        self,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
        known_hash: str | None = None,
    ) -> None:
        self.subject = subject
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.known_hash = known_hash

    @cached_property
    def weights_hash(self) -> str:
        """Sha256 of the weights; where it is not known, a pass over them."""
        return self.known_hash or weights_hash(self.subject.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the provenance of activations says if they are this subject's."""
        return {
            "weights_hash": self.weights_hash,
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "layer": self.subject.layer,
            "width": self.subject.stream.width,
        }


class Corpus(NamedTuple):
    """Text as tokens, and where it comes from."""

    name: str
    revision: str | None
    parts: dict[str, Dataset]
    """`train` and `validation`, or `all` where it is not split."""
    facts: dict[str, Any] | None = None
    """How it was made into sequences, where it was tokenised before: see `tokenized_corpus.CorpusOrigin`."""


def read_corpus(dataset: str, reader: Reader, max_length: int) -> Corpus:
    """The sequences of a corpus folder, or of a text file.

    Args:
        dataset: the folder or the file.
        max_length: tokens of a document of a text file; the rest is cut.

    Raises:
        ValueError: if it cannot be read, or the corpus was made with another tokenizer.
    """
    if not Path(dataset).is_dir():
        sequences = tokenize_documents(read_documents(dataset), reader.tokenizer, max_length)
        return Corpus(dataset, None, {WHOLE: sequences})
    origin = corpus_origin(dataset, reader.tokenizer, reader.name)
    parts = {split: open_corpus(dataset, split) for split in SPLITS}
    return Corpus(origin.name, origin.revision, parts, origin.facts)


def sampled_corpus(
    reader: Reader,
    num_documents: int,
    max_length: int,
    folder: Path,
    seed: int,
    state: PartialState | None = None,
) -> Corpus:
    """Documents that the subject writes, kept in the folder; the first process of `state` writes them.

    Raises:
        ValueError: if another run is writing the same there.
    """
    settings = f"n{num_documents}-length{max_length}-seed{seed}-{reader.weights_hash[:12]}"
    path = folder / f"corpus-{settings}"
    if (state is None or state.is_main_process) and not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = path.with_name(f".{path.name}.lock")
        try:
            lock = FileLock(lock_file).acquire(blocking=False)
        except Timeout as error:
            raise ValueError(
                f"cache_dir: another run is writing documents in {str(folder)!r}; wait for it, or pass another"
            ) from error
        with lock:
            write_samples(reader, num_documents, max_length, path, seed)
            lock_file.unlink(missing_ok=True)
    if state is not None:
        state.wait_for_everyone()
    return Corpus(f"samples of {reader.name}", None, {WHOLE: load_from_disk(path)})


def write_samples(reader: Reader, num_documents: int, max_length: int, path: Path, seed: int) -> None:
    """Has the subject write a corpus, which takes its name when it is whole; one that is there stays."""
    if path.is_dir():  # another run has just been at it
        return
    model, tokenizer = reader.subject.model, reader.tokenizer
    corpus = sample_documents(model, tokenizer, num_documents, max_length, seed=seed, batch_size=256)
    partial = path.with_name(f".{path.name}.partial")
    corpus.save_to_disk(partial)
    sync_folder(partial)
    partial.rename(path)
