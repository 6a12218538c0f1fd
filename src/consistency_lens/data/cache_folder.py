"""The folder of an activation cache while it is built: claimed by one build, filled shard by shard, then made whole.

A shard is written under a temporary name, synced and renamed; then a record of it (rows, bytes, sha256, moments) is
written beside it in the same way. A shard counts only with its record, and the provenance, made of the records, comes
last. So a build may be killed at any moment, and nothing half-written is ever taken for whole.
"""

import json
import platform
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import transformers
from filelock import FileLock, Timeout

from .. import __version__
from ..atomic_write import atomic_file, write_json
from .activation_cache import BUILDING_FILE, PROVENANCE_FILE, file_hash
from .cache_columns import cache_features
from .cache_plan import ShardPlan
from .moments import BlockMoments, block_moments, merge_moments

LOCK_FILE = ".building.lock"
ARGUMENTS_FILE = "arguments.json"
FLOAT16_MAX = 65504.0
NO_TOKENS = np.empty(0, dtype=np.int32)


class CacheWriteError(OSError):
    """A file of a cache could not be written, as when the disk is full; what was finished before is kept."""


class CacheFolder:
    """The folder of one layer's cache while it is built.

    Args:
        path: the folder; made when it is claimed.
        settings: all that the rows depend on, in what JSON can hold. A folder belongs to one build of these settings
            for good.

    Attributes:
        median_norm: of a sample of the rows, where the build drops rows by their norm: what `max_norm` multiplies.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.layer: int = settings["layer"]
        self.median_norm: float | None = None

    def is_finished(self) -> bool:
        """Whether the folder holds the finished cache of these settings; False if it is to be built, or built on.

        Raises:
            ValueError: if it holds a cache of other settings, finished or with a shard, or shards of unknown origin.
        """
        if (self.path / PROVENANCE_FILE).is_file():
            self._check_settings(PROVENANCE_FILE)
            return True
        if any(self.path.glob("shard-*")):
            if not (self.path / BUILDING_FILE).is_file():
                raise ValueError(
                    f"activation cache: {str(self.path)!r} has shards but no {BUILDING_FILE}; choose another folder"
                )
            self._check_settings(BUILDING_FILE)
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other builds out of the folder; the system ends the lock of a build that is killed.

        Raises:
            ValueError: if another build is at work in the folder.
            CacheWriteError: if the folder cannot be made.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(self.path / LOCK_FILE).acquire(blocking=False)
            except Timeout as error:
                raise ValueError(
                    f"activation cache: another build is at work in {str(self.path)!r}; wait for it, stop it, or "
                    "choose another folder"
                ) from error
        with lock:
            try:
                yield
            finally:
                (self.path / LOCK_FILE).unlink(missing_ok=True)

    def claim(self, num_shards: int, arguments: Mapping[str, Any] | None = None) -> None:
        """Makes the folder that of this build, or goes on with what an earlier start of it left.

        To be called where `is_finished` is False: a build of other settings has then left nothing that could be lost.

        Args:
            num_shards: that the finished cache will have.
            arguments: what started the build, kept beside the shards; those of the first start stay.

        Raises:
            CacheWriteError: if nothing can be written there.
        """
        found = self._read(BUILDING_FILE) if (self.path / BUILDING_FILE).is_file() else {}
        goes_on = self._differing(found) is None
        file = self.path / ARGUMENTS_FILE
        with writing(self.path):
            if arguments is not None and not (goes_on and file.is_file()):
                write_json(file, arguments)
            if not goes_on:
                write_json(self.path / BUILDING_FILE, self.settings | {"num_shards": num_shards})
        if goes_on:
            self.median_norm = found.get("median_norm")

    def join(self) -> None:
        """Takes up what the first rank has claimed, on another rank.

        Raises:
            ValueError: if this rank would build something else, as with other weights or another corpus.
        """
        found = self._read(BUILDING_FILE)
        key = self._differing(found)
        if key is not None:
            raise ValueError(
                f"activation cache: the first process has {key} {found.get(key)!r}, another one "
                f"{self.settings[key]!r}; give all of them the same arguments, subject and corpus"
            )
        self.median_norm = found.get("median_norm")

    def keep_median_norm(self, median_norm: float) -> None:
        """Fixes the norm that rows are dropped by, so that it is the same after a kill and for every rank."""
        with writing(self.path):
            write_json(self.path / BUILDING_FILE, self._read(BUILDING_FILE) | {"median_norm": median_norm})
        self.median_norm = median_norm

    def has_shard(self, index: int) -> bool:
        """Whether a shard is there whole: with its record, and of the size that this says."""
        file, record = self._shard_file(index), self._record_file(index)
        if not (file.is_file() and record.is_file()):
            return False
        try:
            return file.stat().st_size == json.loads(record.read_text(encoding="utf-8"))["bytes"]
        except ValueError:  # damaged since it was written: the shard is made again
            return False

    def write_shard(self, index: int, shard: ShardPlan, activations: np.ndarray) -> None:
        """Writes a shard, and its record after it.

        Args:
            index: of the shard.
            shard: what it was read from, N rows.
            activations: (N, d) float32, finite.

        Raises:
            ValueError: if an activation overflows the dtype that it is to be stored in.
            CacheWriteError: if the files cannot be written.
        """
        kept = self._kept_rows(activations)
        values = self._stored(activations[kept])
        table = _shard_table(shard, kept, values)
        file = self._shard_file(index)
        with writing(self.path):
            with atomic_file(file) as stream, pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
            rows, mean, squares = block_moments(values)
            record = {
                "file": file.name,
                "rows": rows,
                "bytes": file.stat().st_size,
                "sha256": file_hash(file),
                "dropped": len(activations) - rows,
                "mean": mean.tolist(),
                "squares": squares,
            }
            write_json(self._record_file(index), record)

    def finish(self, num_shards: int, facts: dict[str, Any]) -> None:
        """Writes the provenance, which makes the cache whole, from the records of its shards.

        Args:
            num_shards: all of them are there.
            facts: what the provenance says besides the settings and what is taken from the records.

        Raises:
            CacheWriteError: if it cannot be written.
        """
        moments = merge_moments(
            BlockMoments(record["rows"], np.array(record["mean"]), record["squares"])
            for record in self._records(num_shards)
        )
        names = ("file", "rows", "bytes", "sha256", "dropped")
        # without the means, which are too large to hold for thousands of shards
        records = [{name: record[name] for name in names} for record in self._records(num_shards)]
        versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, pa, np)}
        provenance = self.settings | facts
        if self.median_norm is not None:
            provenance["norm_filter"] = {
                "median_norm": self.median_norm,
                "largest_norm": self._largest_norm(self.median_norm),
                "dropped_rows": sum(record["dropped"] for record in records),
            }
        provenance |= {
            "rows": sum(record["rows"] for record in records),
            "mean": moments.mean.tolist(),
            "rms": moments.rms,
            "shards": [{name: record[name] for name in ("file", "rows", "bytes", "sha256")} for record in records],
            "versions": {"python": platform.python_version(), "consistency_lens": __version__} | versions,
        }
        with writing(self.path):
            write_json(self.path / PROVENANCE_FILE, provenance)

    def remove_leftovers(self) -> None:
        """Removes from a finished cache what only its build needed, also after a kill between the two."""
        with writing(self.path):
            names = (BUILDING_FILE, LOCK_FILE, "shard-*.json", ".*.partial")
            for file in [file for name in names for file in self.path.glob(name)]:
                file.unlink()

    def _records(self, num_shards: int) -> Iterator[dict[str, Any]]:
        for index in range(num_shards):
            yield json.loads(self._record_file(index).read_text(encoding="utf-8"))

    def _largest_norm(self, median_norm: float) -> float:
        return self.settings["max_norm"] * median_norm

    def _shard_file(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.arrow"

    def _record_file(self, index: int) -> Path:
        return self._shard_file(index).with_suffix(".json")

    def _read(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"activation cache: {str(file)!r} is damaged ({error}); choose another folder or delete that one"
            ) from error

    def _differing(self, found: dict[str, Any]) -> str | None:
        """The first setting that is another one in `found`."""
        return next((key for key, value in self.settings.items() if found.get(key) != value), None)

    def _check_settings(self, name: str) -> None:
        found = self._read(name)
        key = self._differing(found)
        if key is not None:
            raise ValueError(
                f"activation cache: {str(self.path)!r} was built with {key} {found.get(key)!r}, now it is "
                f"{self.settings[key]!r}; choose another folder or delete that one"
            )

    def _kept_rows(self, activations: np.ndarray) -> np.ndarray:
        """Indices of the rows whose norm is not above the largest one that is kept."""
        if self.median_norm is None:
            return np.arange(len(activations))
        return np.flatnonzero(norms(activations) <= self._largest_norm(self.median_norm))

    def _stored(self, activations: np.ndarray) -> np.ndarray:
        largest = float(np.abs(activations).max(initial=0))
        if self.settings["dtype"] == "float16" and largest > FLOAT16_MAX:
            raise ValueError(
                f"activation cache: an activation of layer {self.layer} reaches {largest:.0f} and overflows float16 "
                f"(at most {FLOAT16_MAX:.0f}); pass dtype='float32' (--cache_dtype float32)"
            )
        return activations.astype(self.settings["dtype"], copy=False)


def how_to_finish(path: Path) -> str:
    """How far the build in the folder of an unfinished cache is, and what goes on with it, in one line."""
    building = json.loads((path / BUILDING_FILE).read_text(encoding="utf-8"))
    done = sum(file.with_suffix(".json").is_file() for file in path.glob("shard-*.arrow"))
    # a build of an earlier version does not say how many there will be
    far = f"{done:,} of {building['num_shards']:,} shards are" if "num_shards" in building else f"{done:,} shards are"
    if origin := building.get("pulled_from"):
        names = {"repo": origin["repo"], "revision": origin["commit"], "split": origin["split"], "path": str(path)}
        command = " ".join(["pull", *(f"--{name} {shlex.quote(value)}" for name, value in names.items())])
    elif (path / ARGUMENTS_FILE).is_file():
        command = f"cache --config {shlex.quote(str(path / ARGUMENTS_FILE))}"
    else:
        return f"{far} done; run its build again to finish it"
    return f"{far} done; finish it with: consistency-lens {command}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the system's error of a write inside the `with` block into one that says where and what to do.

    Raises:
        CacheWriteError: for an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise CacheWriteError(
            f"activation cache: cannot write to {str(folder)!r}: {error.strerror or error}; make room (or mend what "
            "it says) and run the same again: what is finished is kept"
        ) from error


def norms(activations: np.ndarray) -> np.ndarray:
    """Euclidean norm of each row of (N, d), (N,) float64."""
    return np.sqrt(np.einsum("nd,nd->n", activations, activations, dtype=np.float64))


def _shard_table(shard: ShardPlan, kept: np.ndarray, values: np.ndarray) -> pa.Table:
    """The rows of a shard, in order.

    Args:
        shard: what it was read from.
        kept: indices of its rows that are stored, (N,).
        values: their activations, (N, d).
    """
    width = values.shape[1]
    counts = [len(positions) for positions in shard.positions]
    sequences = np.repeat(np.arange(len(counts)), counts)[kept]
    positions = np.concatenate(shard.positions)[kept]
    offsets = np.concatenate([[0], np.cumsum(positions + 1)])
    tokens = [shard.contexts[index][: position + 1] for index, position in zip(sequences, positions, strict=True)]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width),
        pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(np.concatenate([*tokens, NO_TOKENS]))),
        pa.array(positions),
        pa.array(shard.documents[sequences]),
    ]
    schema = cache_features(width, str(values.dtype)).arrow_schema
    return pa.Table.from_arrays([col.cast(f.type) for col, f in zip(columns, schema, strict=True)], schema=schema)
