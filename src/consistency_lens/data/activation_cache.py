"""The activation cache: activations of one layer at random positions of a corpus, on disk, with their provenance.

A cache is a folder of Arrow shards (memory-mapped, so its size on disk is not its size in memory) with the columns
`activation` (fixed-size list of d), `input_ids` (tokens 0..P), `position` (P) and `document`, and `provenance.json`.
That file is written last: a folder without it is an unfinished build, never opened, and goes on where it stopped when
the same build is started again. The second activation A' of a row is not stored: it is a pairing of the rows.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..subject import Subject
from .corpus import CORPUS_FEATURES, is_validation_document

logger = logging.getLogger(__name__)

FORMAT = 1
PROVENANCE_FILE = "provenance.json"
BUILDING_FILE = "building.json"
FLOAT16_MAX = 65504.0
BLOCK_ROWS = 8192  # sequences or rows held in memory at a time while planning and while taking moments


class ActivationCache:
    """A finished activation cache, or a part of its rows.

    Attributes:
        dataset: the rows, a `datasets.Dataset`.
        provenance: what the cache was made from and with (see `build_activation_cache`); a part shares the whole's.
        path: the folder.
        rows: (N,) int64, the index of each row in the whole cache.
    """

    def __init__(
        self,
        dataset: Dataset,
        provenance: dict[str, Any],
        path: Path,
        rows: np.ndarray | None = None,
        training_part: "ActivationCache | None" = None,
    ) -> None:
        self.provenance = provenance
        self.path = path
        self.dataset = dataset if rows is None else dataset.select(rows)
        self.rows = np.arange(len(dataset)) if rows is None else rows
        self._whole = dataset
        self._arrow = dataset.with_format("arrow")
        self._arrow_activations = dataset.select_columns("activation").with_format("arrow")
        self._is_part = rows is not None
        self._training_part = training_part

    @classmethod
    def open(
        cls,
        path: str | Path,
        subject_name: str | None = None,
        weights_hash: str | None = None,
        layer: int | None = None,
        width: int | None = None,
    ) -> "ActivationCache":
        """Opens a finished cache; what is passed must agree with its provenance.

        Raises:
            ValueError: if there is no finished cache at `path`, a shard is missing or of the wrong size, or the
                subject's name or weights, the layer or the width differ (the message has both values).
        """
        path = Path(path)
        if not (path / PROVENANCE_FILE).is_file():
            state = "an unfinished" if (path / BUILDING_FILE).is_file() else "no"
            raise ValueError(f"activation cache: {state} cache at {str(path)!r}; run its build (again) to finish it")
        provenance = json.loads((path / PROVENANCE_FILE).read_text(encoding="utf-8"))
        expected = {"subject": subject_name, "weights_hash": weights_hash, "layer": layer, "width": width}
        for name, value in expected.items():
            if value is not None and value != provenance[name]:
                raise ValueError(
                    f"activation cache: {str(path)!r} has {name} {provenance[name]!r}, but the lens has {value!r}; "
                    "build a cache for this lens or pass the right one"
                )
        for shard in provenance["shards"]:
            file = path / shard["file"]
            size = file.stat().st_size if file.is_file() else 0
            if size != shard["bytes"]:
                raise ValueError(
                    f"activation cache: {str(file)!r} has {size} bytes instead of {shard['bytes']}; restore it from a "
                    "copy, or delete the folder and build again"
                )
        shards = [Dataset.from_file(str(path / shard["file"])) for shard in provenance["shards"]]
        return cls(concatenate_datasets(shards), provenance, path)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def documents(self) -> np.ndarray:
        """Document hash of every row, (N,) int64."""
        return self._whole.data.column("document").to_numpy()[self.rows]

    @property
    def mean(self) -> torch.Tensor:
        """Mean activation, (d,) float32: of all rows, or of the training part for both sides of a split."""
        return torch.tensor(self._moments.mean, dtype=torch.float32)

    @property
    def rms(self) -> float:
        """Root mean square over rows and dimensions of A - mean, of the same rows as `mean`."""
        return self._moments.rms

    @cached_property
    def _moments(self) -> "Moments":
        if self._training_part is not None:
            return self._training_part._moments
        if not self._is_part:
            return Moments(np.array(self.provenance["mean"]), self.provenance["rms"])
        blocks = range(0, len(self), BLOCK_ROWS)
        return streaming_moments(self.activations(np.arange(i, min(i + BLOCK_ROWS, len(self)))) for i in blocks)

    def activations(self, indices: np.ndarray) -> np.ndarray:
        """Activations of the given rows of this cache or part, (B, d), in the stored dtype."""
        return _activation_matrix(self._arrow_activations[self.rows[indices]])

    def table(self, indices: np.ndarray) -> pa.Table:
        """The given rows of this cache or part, every column."""
        return self._arrow[self.rows[indices]]

    def split(self, validation_fraction: float) -> tuple["ActivationCache", "ActivationCache"]:
        """Splits into (train, validation) by document hash; `mean` and `rms` of both are those of the training rows.

        Raises:
            ValueError: if the fraction is outside (0, 1) or one side would be empty.
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}; try 0.05")
        held_out = np.array([is_validation_document(doc, validation_fraction) for doc in self.documents.tolist()])
        if held_out.all() or not held_out.any():
            raise ValueError(
                f"activation cache: {len(np.unique(self.documents))} documents cannot be split with "
                f"validation_fraction={validation_fraction} (one side is empty); add documents or change the fraction"
            )
        train = ActivationCache(self._whole, self.provenance, self.path, self.rows[~held_out])
        return train, ActivationCache(self._whole, self.provenance, self.path, self.rows[held_out], train)

    def pair(self, seed: int) -> np.ndarray:
        """For every row the index (in this cache or part) of the row that gives A', (N,) int64, never of its document.

        A permutation, so that every row serves once. Where one document holds more than half of the rows no such
        permutation exists: then the rows of the others serve it several times.

        Raises:
            ValueError: if all rows come from one document.
        """
        names, group, sizes = np.unique(self.documents, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise ValueError(
                f"activation cache: A' must come from another document, but all {len(self)} rows are of one; "
                "add documents"
            )
        generator = np.random.default_rng(seed)
        num_rows, largest = len(self), int(sizes.max())
        partners = np.empty(num_rows, dtype=np.int64)
        if 2 * largest <= num_rows:
            # Documents one after the other, in random order: a rotation by at least the largest one leaves each.
            order = np.lexsort((generator.random(num_rows), generator.permutation(len(names))[group]))
            partners[order] = np.roll(order, -generator.integers(largest, num_rows - largest + 1))
            return partners
        inside = generator.permutation(np.flatnonzero(group == sizes.argmax()))
        outside = generator.permutation(np.flatnonzero(group != sizes.argmax()))
        partners[inside] = np.resize(outside, len(inside))
        partners[outside] = inside[: len(outside)]
        return partners

    def verify(self) -> None:
        """Reads every shard of the whole cache and checks its sha256, its row count and that all values are finite.

        Raises:
            ValueError: naming the first shard that is not as it was written, and what differs.
        """
        for shard in self.provenance["shards"]:
            file = self.path / shard["file"]
            if not file.is_file() or _file_hash(file) != shard["sha256"]:
                raise ValueError(
                    f"activation cache: {str(file)!r} is missing or its sha256 is not {shard['sha256']}; restore it "
                    "from a copy, or delete the folder and build again"
                )
            activations = _read_activations(file)
            if len(activations) != shard["rows"] or not np.isfinite(activations).all():
                raise ValueError(
                    f"activation cache: {str(file)!r} has {len(activations)} rows of {shard['rows']}, or values that "
                    "are not finite; delete the folder and build again"
                )


class ActivationRows(torch.utils.data.Dataset):
    """An activation cache as a torch dataset: a row is a dict that `data.collator.ActivationCollator` understands.

    Keys: `activation` (d,), `input_ids` (P + 1,) int32, `position`, `document`, `row` (index in the whole cache; the
    key of the row's sampling noise) and, with `pair_seed`, `other_activation` (d,), the A' of `ActivationCache.pair`.

    Raises:
        ValueError: with `pair_seed`, if all rows come from one document.
    """

    def __init__(self, cache: ActivationCache, pair_seed: int | None = None) -> None:
        self.cache = cache
        self.partners = None if pair_seed is None else cache.pair(pair_seed)

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch, read together: what torch's DataLoader calls where it exists."""
        chosen = np.asarray(indices)
        table = self.cache.table(chosen)
        columns: dict[str, Iterable[Any]] = {
            "activation": _activation_matrix(table),
            "input_ids": _token_lists(table),
            "position": np.asarray(table["position"]),
            "document": np.asarray(table["document"]),
            "row": self.cache.rows[chosen],
        }
        if self.partners is not None:
            columns["other_activation"] = self.cache.activations(self.partners[chosen])
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def build_activation_cache(
    subject: Subject,
    corpus: Dataset,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    subject_name: str,
    dataset_name: str,
    subject_revision: str | None = None,
    dataset_revision: str | None = None,
    positions_per_sequence: int = 1,
    min_position: int = 8,
    dtype: str = "float16",
    batch_size: int = 32,
    rows_per_shard: int = 8192,
    seed: int = 0,
    progress: bool = True,
) -> ActivationCache:
    """Runs the subject over a corpus and caches its activations at random positions; returns the opened cache.

    From each sequence of S tokens come K = `positions_per_sequence` rows (fewer where it has no more positions), at
    distinct positions uniform in [min_position, S - 2]. They depend on the seed, the document and the sequence's index
    in the corpus, and on nothing else. Sequences too short for one position are skipped and counted. A build that was
    killed goes on when started again with the same arguments; a finished one is opened.

    Args:
        corpus: see `data.corpus`; columns `input_ids` and `document`.
        tokenizer: the one that made the corpus, for the provenance.
        dtype: of the stored activations, "float16" or "float32".
        batch_size: sequences in one forward pass of the subject.
        rows_per_shard: about how many rows a file holds, hence how many a killed build may lose.

    Raises:
        ValueError: for a bad argument, an empty corpus or one without a long enough sequence, tokens or a tokenizer
            beyond the subject's vocabulary, activations that are not finite or overflow float16, and a folder that
            holds a cache built with other settings.
    """
    path = Path(path)
    _check_arguments(corpus, positions_per_sequence, min_position, dtype, batch_size, rows_per_shard)
    plan = _plan(corpus, subject, tokenizer, min_position)
    settings = {
        "format": FORMAT,
        "subject": subject_name,
        "subject_revision": subject_revision,
        "weights_hash": weights_hash(subject.model),
        "tokenizer": tokenizer.name_or_path,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "layer": subject.layer,
        "width": subject.stream.width,
        "positions": {
            "rule": "uniform without replacement in [min_position, length - 2]",
            "per_sequence": positions_per_sequence,
            "min_position": min_position,
        },
        "dtype": dtype,
        "dataset": dataset_name,
        "dataset_revision": dataset_revision,
        "dataset_hash": plan.dataset_hash,
        "seed": seed,
        "rows_per_shard": rows_per_shard,
    }
    if _claim(path, settings):
        return ActivationCache.open(path)
    sequences_per_shard = max(1, rows_per_shard // positions_per_sequence)
    files: list[Path] = []
    with tqdm(total=len(plan.sequences), desc="caching activations", unit="sequence", disable=not progress) as bar:
        for start in range(0, len(plan.sequences), sequences_per_shard):
            sequences = plan.sequences[start : start + sequences_per_shard]
            file = path / f"shard-{len(files):05d}.arrow"
            if not file.exists():
                shard = _plan_shard(corpus, sequences, positions_per_sequence, min_position, seed)
                activations = _activation_pass(subject, shard, batch_size, bar)
                _check_values(activations, subject.layer, dtype)
                _write_shard(file, shard, activations, dtype)
            bar.update(start + len(sequences) - bar.n)
            files.append(file)
    _finish(path, files, settings, {"kept": len(plan.sequences), "skipped_too_short": plan.num_skipped})
    return ActivationCache.open(path)


def draw_positions(
    length: int, document: int, index: int, positions_per_sequence: int, min_position: int, seed: int
) -> np.ndarray:
    """Up to K distinct positions of one sequence, ascending, uniform in [min_position, length - 2], (K,) int64."""
    available = length - 1 - min_position
    generator = np.random.default_rng([seed, document, index])
    chosen = generator.choice(available, size=min(positions_per_sequence, available), replace=False)
    return np.sort(chosen) + min_position


def weights_hash(model: PreTrainedModel) -> str:
    """Sha256 over names, dtypes, shapes and bytes of a model's parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sha256 over a tokenizer's vocabulary and special tokens."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.special_tokens_map.items())]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, default=str).encode()).hexdigest()


class Moments(NamedTuple):
    """First and second moment of a set of activations."""

    mean: np.ndarray
    """(d,) float64."""
    rms: float
    """sqrt of the mean over rows and dimensions of (A - mean)^2."""


def streaming_moments(blocks: Iterable[np.ndarray]) -> Moments:
    """Mean and RMS of activations that come in blocks (n, d), in float64 and one pass (Chan et al. 1979)."""
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        block = block.astype(np.float64)
        block_mean = block.mean(axis=0)
        delta = block_mean - mean
        total = count + len(block)
        squares = squares + ((block - block_mean) ** 2).sum(axis=0) + delta**2 * (count * len(block) / total)
        mean = mean + delta * (len(block) / total)
        count = total
    return Moments(mean, float(np.sqrt(squares.sum() / (count * mean.size))))


class _Plan(NamedTuple):
    """What a build will read: the sequences that are long enough, and the identity of the whole corpus."""

    sequences: np.ndarray
    num_skipped: int
    dataset_hash: str


class _ShardPlan(NamedTuple):
    """What one shard will hold; each field has one entry for each of its sequences."""

    contexts: list[np.ndarray]
    """The tokens up to the last position."""
    positions: list[np.ndarray]
    documents: np.ndarray


def _check_arguments(
    corpus: Dataset, positions_per_sequence: int, min_position: int, dtype: str, batch_size: int, rows_per_shard: int
) -> None:
    counts = {
        "positions_per_sequence": positions_per_sequence,
        "batch_size": batch_size,
        "rows_per_shard": rows_per_shard,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"activation cache: {name} must be at least 1, got {value}")
    if min_position < 0:
        raise ValueError(f"activation cache: min_position must be 0 or more, got {min_position}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"activation cache: dtype must be 'float16' or 'float32', got {dtype!r}")
    missing = [name for name in CORPUS_FEATURES if name not in corpus.column_names]
    if missing:
        raise ValueError(f"activation cache: the corpus lacks {missing}, it has {corpus.column_names}; tokenise it")
    if len(corpus) == 0:
        raise ValueError("activation cache: the corpus is empty; pass at least one sequence")


def _plan(corpus: Dataset, subject: Subject, tokenizer: PreTrainedTokenizerBase, min_position: int) -> _Plan:
    vocab_size = subject.model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"activation cache: the tokenizer has {len(tokenizer)} tokens, but the subject only {vocab_size}; "
            "pass the subject's own tokenizer"
        )
    digest, lengths = hashlib.sha256(), []
    for start in range(0, len(corpus), BLOCK_ROWS):
        table = _corpus_table(corpus, np.arange(start, min(start + BLOCK_ROWS, len(corpus))))
        tokens = table["input_ids"].combine_chunks().flatten().to_numpy()
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise ValueError(
                f"activation cache: the corpus has token ids from {tokens.min()} to {tokens.max()}, but the subject's "
                f"vocabulary is {vocab_size}; tokenise with the subject's own tokenizer"
            )
        lengths.append(pc.list_value_length(table["input_ids"]).to_numpy())
        for column in (lengths[-1], table["document"].to_numpy(), tokens):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
    length = np.concatenate(lengths)
    sequences = np.flatnonzero(length >= min_position + 2)
    if len(sequences) == 0:
        raise ValueError(
            f"activation cache: the longest of {len(corpus)} sequences has {length.max()} tokens, too short for "
            f"min_position={min_position} and a next token; lower min_position or pass longer text"
        )
    return _Plan(sequences, len(corpus) - len(sequences), digest.hexdigest())


def _claim(path: Path, settings: dict[str, Any]) -> bool:
    """Makes `path` the folder of a build with these settings; True if it already holds the finished cache.

    Raises:
        ValueError: if the folder holds a cache, finished or not, with other settings, or shards of unknown origin.
    """
    path.mkdir(parents=True, exist_ok=True)
    for file in (path / PROVENANCE_FILE, path / BUILDING_FILE):
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"activation cache: {str(path)!r} was built with {name} {found.get(name)!r}, now it is "
                        f"{value!r}; choose another folder or delete that one"
                    )
            return file.name == PROVENANCE_FILE
    if any(path.glob("shard-*.arrow")):
        raise ValueError(f"activation cache: {str(path)!r} has shards but no {BUILDING_FILE}; choose another folder")
    with _atomic_file(path / BUILDING_FILE) as file_object:
        file_object.write(json.dumps(settings, indent=2).encode())
    return False


def _plan_shard(
    corpus: Dataset, sequences: np.ndarray, positions_per_sequence: int, min_position: int, seed: int
) -> _ShardPlan:
    table = _corpus_table(corpus, sequences)
    documents = table["document"].to_numpy()
    contexts, positions = [], []
    for tokens, document, index in zip(_token_lists(table), documents, sequences, strict=True):
        drawn = draw_positions(len(tokens), int(document), int(index), positions_per_sequence, min_position, seed)
        contexts.append(tokens[: drawn[-1] + 1])
        positions.append(drawn)
    return _ShardPlan(contexts, positions, documents)


def _activation_pass(subject: Subject, shard: _ShardPlan, batch_size: int, bar: tqdm) -> np.ndarray:
    """Activations (N, d) float32 of a shard's rows, in order; each sequence runs once, no further than is read."""
    first_row = np.cumsum([0] + [len(positions) for positions in shard.positions])
    by_length = np.argsort([-len(context) for context in shard.contexts], kind="stable")
    activations = np.empty((first_row[-1], subject.stream.width), dtype=np.float32)
    device = subject.model.device
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        input_ids = np.zeros((len(batch), len(shard.contexts[batch[0]])), dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, sequence in enumerate(batch):
            context = shard.contexts[sequence]
            input_ids[index, : len(context)] = context
            attention_mask[index, : len(context)] = 1
        hidden = subject.activations(
            torch.from_numpy(input_ids).to(device), torch.from_numpy(attention_mask).to(device)
        )
        positions = np.concatenate([shard.positions[sequence] for sequence in batch])
        places = np.repeat(np.arange(len(batch)), [len(shard.positions[sequence]) for sequence in batch])
        rows = np.concatenate([np.arange(first_row[sequence], first_row[sequence + 1]) for sequence in batch])
        activations[rows] = hidden[torch.from_numpy(places), torch.from_numpy(positions)].float().cpu().numpy()
        bar.update(len(batch))
    return activations


def _check_values(activations: np.ndarray, layer: int, dtype: str) -> None:
    bad_rows = int((~np.isfinite(activations)).any(axis=1).sum())
    if bad_rows:
        raise ValueError(
            f"activation cache: {bad_rows} of {len(activations)} activations of layer {layer} are not finite; load the "
            "subject in float32 or bfloat16, or check its weights"
        )
    largest = float(np.abs(activations).max())
    if dtype == "float16" and largest > FLOAT16_MAX:
        raise ValueError(
            f"activation cache: an activation of layer {layer} reaches {largest:.0f} and overflows float16 (at most "
            f"{FLOAT16_MAX:.0f}); pass dtype='float32'"
        )


def _write_shard(file: Path, shard: _ShardPlan, activations: np.ndarray, dtype: str) -> None:
    width = activations.shape[1]
    features = Features(
        {
            "activation": List(Value(dtype), length=width),
            "input_ids": List(Value("int32")),
            "position": Value("int32"),
            "document": Value("int64"),
        }
    )
    positions = np.concatenate(shard.positions)
    offsets = np.concatenate([[0], np.cumsum(positions + 1)])
    tokens = [
        context[: position + 1]
        for context, drawn in zip(shard.contexts, shard.positions, strict=True)
        for position in drawn
    ]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(activations.astype(dtype).reshape(-1)), width),
        pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(np.concatenate(tokens))),
        pa.array(positions),
        pa.array(np.repeat(shard.documents, [len(drawn) for drawn in shard.positions])),
    ]
    schema = features.arrow_schema
    table = pa.Table.from_arrays([col.cast(f.type) for col, f in zip(columns, schema, strict=True)], schema=schema)
    with _atomic_file(file) as stream, pa.ipc.new_stream(stream, schema) as writer:
        writer.write_table(table)


def _finish(path: Path, files: list[Path], settings: dict[str, Any], sequences: dict[str, int]) -> None:
    """Reads every shard once for its checksum and moments and writes the provenance, which makes the cache whole."""
    shards: list[dict[str, Any]] = []

    def blocks() -> Iterator[np.ndarray]:
        for file in files:
            activations = _read_activations(file)
            size = file.stat().st_size
            shards.append({"file": file.name, "rows": len(activations), "bytes": size, "sha256": _file_hash(file)})
            yield activations

    moments = streaming_moments(blocks())
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, pa, np)}
    provenance = settings | {
        "rows": sum(shard["rows"] for shard in shards),
        "sequences": sequences,
        "mean": moments.mean.tolist(),
        "rms": moments.rms,
        "shards": shards,
        "versions": {"python": platform.python_version()} | versions,
    }
    with _atomic_file(path / PROVENANCE_FILE) as file_object:
        file_object.write(json.dumps(provenance, indent=2).encode())
    (path / BUILDING_FILE).unlink()


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name whole or not at all, and stays there when the power fails."""
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_activations(file: Path) -> np.ndarray:
    """The activations of one shard, (N, d)."""
    with pa.memory_map(str(file)) as stream:
        return _activation_matrix(pa.ipc.open_stream(stream).read_all())


def _corpus_table(corpus: Dataset, indices: np.ndarray) -> pa.Table:
    return corpus.select_columns(list(CORPUS_FEATURES)).with_format("arrow")[indices]


def _activation_matrix(table: pa.Table) -> np.ndarray:
    column = table["activation"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _token_lists(table: pa.Table) -> list[np.ndarray]:
    column = table["input_ids"].combine_chunks()
    ends = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    return np.split(column.flatten().to_numpy(), ends[:-1])
