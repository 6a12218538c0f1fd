"""The activation cache: activations of one layer at random positions of a corpus, on disk, with their provenance.

A cache is a folder of Arrow shards (memory-mapped, so its size on disk is not its size in memory) with the columns
`activation` (fixed-size list of d), `input_ids` (tokens 0..P), `position` (P) and `document`, and `provenance.json`.
That file is written last: a folder without it is an unfinished build, never opened, and goes on where it stopped when
the same build is started again. The second activation A' of a row is not stored: it is a pairing of the rows.
"""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from .activation_source import ActivationSource
from .moments import Moments

PROVENANCE_FILE = "provenance.json"
BUILDING_FILE = "building.json"


class ActivationCache(ActivationSource):
    """A finished activation cache, or a part of its rows.

    Attributes:
        dataset: the rows, a `datasets.Dataset`.
        provenance: what the cache was made from and with (see `build_activation_caches`); a part shares the whole's.
        path: the folder.
        rows: (N,) int64, the index of each row in the whole cache.
    """

    def __init__(
        self,
        dataset: Dataset,
        provenance: dict[str, Any],
        path: Path,
        rows: np.ndarray | None = None,
        training_part: ActivationSource | None = None,
    ) -> None:
        super().__init__(provenance, np.arange(len(dataset)) if rows is None else rows, training_part)
        self.path = path
        self.dataset = dataset if rows is None else dataset.select(rows)
        self._whole = dataset
        self._is_part = rows is not None
        self._arrow = dataset.with_format("arrow")

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
            ValueError: if there is no finished cache at `path`, a shard is missing, damaged or of the wrong size, or
                the subject's name or weights, the layer or the width differ (the message has both values).
        """
        path = Path(path)
        if not (path / PROVENANCE_FILE).is_file():
            state = "an unfinished" if (path / BUILDING_FILE).is_file() else "no"
            raise ValueError(f"activation cache: {state} cache at {str(path)!r}; run its build (again) to finish it")
        provenance = read_provenance(path)
        expected = {"subject": subject_name, "weights_hash": weights_hash, "layer": layer, "width": width}
        check_provenance(str(path), provenance, **expected)
        for shard in provenance["shards"]:
            file = path / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                raise ValueError(
                    f"activation cache: {str(file)!r} {state}; restore it from a copy, or delete the folder and build "
                    "again"
                )
        try:
            shards = [Dataset.from_file(str(path / shard["file"])) for shard in provenance["shards"]]
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"activation cache: a shard in {str(path)!r} is damaged ({error}); find it with consistency-lens "
                "verify, and restore it from a copy, or delete the folder and build again"
            ) from error
        return cls(concatenate_datasets(shards), provenance, path)

    @cached_property
    def documents(self) -> np.ndarray:
        """Document hash of every row, (N,) int64."""
        return self._whole.data.column("document").to_numpy()[self.rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the context of every row, (N,) int64."""
        return pc.list_value_length(self._whole.data.column("input_ids")).to_numpy()[self.rows].astype(np.int64)

    @cached_property
    def _arrow_contexts(self) -> Dataset:
        return self._whole.select_columns("input_ids").with_format("arrow")

    @cached_property
    def _arrow_activations(self) -> Dataset:
        return self._whole.select_columns("activation").with_format("arrow")

    def contexts(self, indices: np.ndarray) -> list[np.ndarray]:
        """Tokens 0..P of the given rows of this cache or part, int32."""
        return token_lists(self._arrow_contexts[self.rows[indices]])

    def activations(self, indices: np.ndarray) -> np.ndarray:
        """Activations of the given rows of this cache or part, (B, d), in the stored dtype."""
        return activation_matrix(self._arrow_activations[self.rows[indices]])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Activations (B, d) and contexts of the given rows, in one go."""
        table = self._arrow[self.rows[indices]]
        return activation_matrix(table), token_lists(table)

    def part(self, rows: np.ndarray, training_part: ActivationSource | None = None) -> "ActivationCache":
        """The rows with these indices in the whole cache."""
        return ActivationCache(self._whole, self.provenance, self.path, rows, training_part)

    def own_moments(self) -> Moments:
        """Mean and RMS: of a whole cache as its provenance has them, of a part by reading it."""
        if self._is_part:
            return self.moments_of_all()
        return Moments(np.array(self.provenance["mean"]), self.provenance["rms"])


def read_provenance(path: Path) -> dict[str, Any]:
    """The provenance of a finished cache.

    Raises:
        ValueError: if it is damaged, or of something else.
    """
    file = path / PROVENANCE_FILE
    try:
        provenance = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"activation cache: {str(file)!r} is damaged ({error}); restore it from a copy, or delete the folder and "
            "build again"
        ) from error
    if not isinstance(provenance, dict) or "shards" not in provenance:
        raise ValueError(f"activation cache: {str(file)!r} is of something else; pass the folder of a cache")
    return provenance


def check_provenance(place: str, provenance: dict[str, Any], **expected: Any) -> None:
    """Checks activations against what they are to be used with.

    Args:
        place: what the message calls them.
        provenance: of the activations.
        expected: keys of the provenance with the lens's own values; None for what is not known.

    Raises:
        ValueError: naming the first that differs, with both values.
    """
    for name, value in expected.items():
        if value is not None and value != provenance[name]:
            loaded = provenance.get("loaded_as", {}).get("dtype")
            hint = f" (the cache was read in {loaded})" if name == "weights_hash" and loaded else ""
            raise ValueError(
                f"activation cache: {place!r} has {name} {provenance[name]!r}, but the lens has {value!r}{hint}; "
                "build a cache for this lens or pass the right one"
            )


def cache_path(root: str | Path, dataset: str, model: str, layer: int, split: str) -> Path:
    """Where a cache lies unless told otherwise: `<root>/<dataset>/<model>/layer_<k>/<split>`.

    Of a dataset or model that is a file or folder here the last part of its path is taken, without a file's suffix;
    in a Hub id every slash becomes `--`.
    """
    return Path(root) / _folder_name(dataset) / _folder_name(model) / f"layer_{layer}" / _folder_name(split)


def _folder_name(name: str) -> str:
    path = Path(name)
    last = (path.stem if path.is_file() else path.resolve().name) if path.exists() else name
    return re.sub(r"[^\w.-]+", "--", last).strip(".-") or "_"


def file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_sha256(digest: Any) -> bool:
    """Whether this is a sha256 as `file_hash` writes it; what others wrote may be anything, also a path."""
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def activation_matrix(table: pa.Table) -> np.ndarray:
    """The activations of a table's rows, (N, d)."""
    column = table["activation"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def token_lists(table: pa.Table) -> list[np.ndarray]:
    """The tokens of each of a table's rows."""
    column = table["input_ids"].combine_chunks()
    ends = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    return np.split(column.flatten().to_numpy(), ends[:-1])
