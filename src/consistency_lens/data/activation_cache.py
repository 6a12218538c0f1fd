"""The activation cache: activations of one layer at random positions of a corpus, on disk, with their provenance.

A cache is a folder of Arrow shards (memory-mapped, so its size on disk is not its size in memory) with the columns
`activation` (fixed-size list of d), `input_ids` (tokens 0..P), `position` (P) and `document`, and `provenance.json`.
That file is written last: a folder without it is an unfinished build, never opened, and goes on where it stopped when
the same build is started again. The second activation A' of a row is not stored: it is a pairing of the rows.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets

from .corpus import is_validation_document

PROVENANCE_FILE = "provenance.json"
BUILDING_FILE = "building.json"
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, of well mixed bits
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

    def split_unseen(self, validation_fraction: float) -> tuple["ActivationCache", "ActivationCache"]:
        """As `split`, without the held-out rows whose whole context is also the beginning of a training context.

        Documents may share their first words (those that a model writes often do): then a held-out row is a training
        row over again, and what is measured on it is memory.

        Raises:
            ValueError: see `split`, or if the rows left are of fewer than two documents.
        """
        train, held_out = self.split(validation_fraction)
        wanted = np.concatenate([ends for ends, _ in held_out._context_hashes()])
        seen = [np.intersect1d(beginnings, wanted) for _, beginnings in train._context_hashes()]
        kept = held_out.rows[~np.isin(wanted, np.concatenate(seen))]
        unseen = ActivationCache(self._whole, self.provenance, self.path, kept, train)
        if len(np.unique(unseen.documents)) < 2:
            raise ValueError(
                f"activation cache: validation_fraction={validation_fraction} leaves {len(unseen)} held-out rows with "
                "contexts of their own, from fewer than two documents; add documents or raise it"
            )
        return train, unseen

    def _context_hashes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For blocks of rows: hashes of their contexts (n,), and of all beginnings of these, flat."""
        for start in range(0, len(self), BLOCK_ROWS):
            contexts = token_lists(self._arrow[self.rows[start : start + BLOCK_ROWS]])
            lengths = np.array([len(context) for context in contexts])
            hashes = np.zeros((len(contexts), lengths.max()), dtype=np.uint64)
            inside = np.arange(lengths.max()) < lengths[:, None]
            hashes[inside] = np.concatenate(contexts).astype(np.uint64) + np.uint64(1)
            for index in range(1, hashes.shape[1]):
                hashes[:, index] += hashes[:, index - 1] * HASH_MULTIPLIER  # wraps modulo 2^64
            yield hashes[np.arange(len(contexts)), lengths - 1], hashes[inside]

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
            "input_ids": token_lists(table),
            "position": np.asarray(table["position"]),
            "document": np.asarray(table["document"]),
            "row": self.cache.rows[chosen],
        }
        if self.partners is not None:
            columns["other_activation"] = self.cache.activations(self.partners[chosen])
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Moments(NamedTuple):
    """First and second moment of a set of activations."""

    mean: np.ndarray
    """(d,) float64."""
    rms: float
    """sqrt of the mean over rows and dimensions of (A - mean)^2."""


class BlockMoments(NamedTuple):
    """What a block of rows contributes to the moments of a set."""

    rows: int
    mean: np.ndarray
    """(d,) float64; zeros for an empty block."""
    squares: float
    """Sum over rows and dimensions of (A - mean)^2."""


def block_moments(block: np.ndarray) -> BlockMoments:
    """Moments of activations (n, d), in float64."""
    centred = block.astype(np.float64)
    mean = centred.mean(axis=0) if len(block) else np.zeros(block.shape[1])
    centred -= mean
    return BlockMoments(len(block), mean, float(np.einsum("nd,nd->", centred, centred)))


def merge_moments(blocks: Iterable[BlockMoments]) -> Moments:
    """Moments of all rows of several blocks (Chan et al. 1979); at least one block must have rows."""
    count, mean, squares = 0, np.zeros(()), 0.0
    for rows, block_mean, block_squares in blocks:
        if rows == 0:
            continue
        delta = block_mean - mean
        total = count + rows
        squares += block_squares + float((delta**2).sum()) * (count * rows / total)
        mean = mean + delta * (rows / total)
        count = total
    return Moments(mean, float(np.sqrt(squares / (count * mean.size))))


def streaming_moments(blocks: Iterable[np.ndarray]) -> Moments:
    """Mean and RMS of activations that come in blocks (n, d), in float64 and one pass."""
    return merge_moments(block_moments(block) for block in blocks)


def cache_path(root: str | Path, dataset: str, model: str, layer: int, split: str) -> Path:
    """Where a cache lies unless told otherwise: `<root>/<dataset>/<model>/layer_<k>/<split>`.

    Of a dataset or model that is a file or folder here the last part of its path is taken; in a Hub id every slash
    becomes `--`.
    """
    return Path(root) / _folder_name(dataset) / _folder_name(model) / f"layer_{layer}" / _folder_name(split)


def _folder_name(name: str) -> str:
    last = Path(name).resolve().name if Path(name).exists() else name
    return re.sub(r"[^\w.-]+", "--", last).strip(".-") or "_"


def file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _activation_matrix(table: pa.Table) -> np.ndarray:
    column = table["activation"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def token_lists(table: pa.Table) -> list[np.ndarray]:
    column = table["input_ids"].combine_chunks()
    ends = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    return np.split(column.flatten().to_numpy(), ends[:-1])
