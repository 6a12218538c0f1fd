"""Verification of an activation cache: its files against its provenance, and its provenance against the subject.

Every check is made and reported, not only the first that fails. A shard whose checksum is wrong is not read any
further, for nothing in it can be relied on.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..hub_connection import first_line
from .activation_cache import BUILDING_FILE, PROVENANCE_FILE, file_hash
from .cache_against_subject import LoadedWeights, subject_checks
from .cache_check import Check
from .cache_columns import cache_features
from .cache_folder import how_to_finish
from .moments import BlockMoments, block_moments, merge_moments

KEYS = ("subject", "weights_hash", "tokenizer_hash", "layer", "width", "dtype", "positions", "rows", "mean", "rms")
BLOCK_ROWS = 1024  # read at a time, so that memory does not depend on the size of a shard
MOMENTS_TOLERANCE = 1e-6  # of mean and rms, in units of the rms: float64 sums in another order


class ShardFindings(NamedTuple):
    """What a pass over one shard found."""

    rows: int
    moments: list[BlockMoments]
    problems: dict[str, list[str]]
    """Name of a check -> what is wrong."""
    readable: bool


def find_caches(path: str | Path) -> list[Path]:
    """The folders of the activation caches at `path` or below it, finished or not.

    Raises:
        ValueError: if there is none, or the one at `path` itself is unfinished.
    """
    path = Path(path)
    if is_cache(path):
        return [path]
    if (path / BUILDING_FILE).is_file():
        raise ValueError(f"cache: an unfinished cache at {str(path)!r}: {how_to_finish(path)}")
    if not path.is_dir():
        raise ValueError(f"cache: no folder at {str(path)!r}; pass a cache, or a folder with caches below it")
    finished = {file.parent for file in path.rglob(PROVENANCE_FILE) if is_cache(file.parent)}
    unfinished = {file.parent for file in path.rglob(BUILDING_FILE)}
    if not finished | unfinished:
        raise ValueError(f"cache: no cache at {str(path)!r} or below it; make one with: consistency-lens cache")
    return sorted(finished | unfinished)


def is_cache(path: Path) -> bool:
    """Whether a folder holds a finished cache, or one whose provenance is damaged; other artifacts have another."""
    file = path / PROVENANCE_FILE
    if not file.is_file():
        return False
    try:
        return "shards" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return any(path.glob("shard-*.arrow"))


def verify_cache(
    path: str | Path,
    subject: LoadedWeights | None = None,
    sample_rows: int = 64,
    progress: bool = True,
    name: str | None = None,
) -> list[Check]:
    """Checks a cache: checksums, counts, columns, values, positions and moments, and with `subject` what it was read
    from. Memory does not grow with the rows.

    Args:
        path: folder of the cache.
        subject: the one that its provenance names; its activations are computed anew for a sample of the rows.
        sample_rows: how many of them, spread evenly over the cache.
        name: of the cache on the bar; default: that of its folder.

    Returns:
        All checks, in order. Where the provenance cannot be used or the cache is unfinished, one that says so.
    """
    path = Path(path)
    if not (path / PROVENANCE_FILE).is_file():
        told = how_to_finish(path) if (path / BUILDING_FILE).is_file() else "run its build (again) to finish it"
        return [Check("finished", False, f"no {PROVENANCE_FILE}: {told}")]
    try:
        provenance = _read_provenance(path)
    except ValueError as error:
        return [Check("provenance", False, str(error))]
    shards = provenance["shards"]
    bar = tqdm(shards, desc=f"verifying {name or path.name}", unit=" shards", disable=not progress)
    findings = [_check_shard(path / shard["file"], shard, provenance) for shard in bar]
    checks = [Check("provenance", True, f"layer {provenance['layer']} of {provenance['subject']}")]
    checks += _content_checks(path, provenance, findings)
    if subject is not None:
        checks += subject_checks(path, provenance, [finding.readable for finding in findings], subject, sample_rows)
    return checks


def _read_provenance(path: Path) -> dict[str, Any]:
    """The provenance, with all that is needed here.

    Raises:
        ValueError: if it is no JSON, or lacks something.
    """
    provenance = json.loads((path / PROVENANCE_FILE).read_text(encoding="utf-8"))
    missing = [key for key in (*KEYS, "shards") if key not in provenance]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    return provenance


# The files


def _check_shard(file: Path, shard: dict[str, Any], provenance: dict[str, Any]) -> ShardFindings:
    """Reads a shard once for its checksum and once for its rows."""
    problems: dict[str, list[str]] = defaultdict(list)
    if not file.is_file():
        problems["shards"].append(f"{file.name}: missing")
        problems["checksums"].append(f"{file.name}: missing")
    elif (found := file_hash(file)) != shard["sha256"]:
        size = file.stat().st_size
        problems["checksums"].append(
            f"{file.name}: sha256 {found[:12]}…, not {shard['sha256'][:12]}… ({size:,} bytes of {shard['bytes']:,})"
        )
    if problems:
        return ShardFindings(0, [], problems, False)
    rows, moments = 0, []
    try:
        with pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as reader:
            _check_columns(reader.schema, file.name, provenance, problems)
            if problems:
                return ShardFindings(0, [], problems, False)
            for table in _blocks(reader):
                activations = _check_rows(table, rows, file.name, provenance, problems)
                moments.append(block_moments(activations))
                rows += len(table)
    except (pa.ArrowInvalid, OSError) as error:
        problems["columns"].append(f"{file.name}: no Arrow stream ({first_line(error)})")
        return ShardFindings(0, [], problems, False)
    if rows != shard["rows"]:
        problems["rows"].append(f"{file.name}: {rows:,} rows, not {shard['rows']:,}")
    return ShardFindings(rows, moments, problems, True)


def _blocks(reader: pa.RecordBatchStreamReader) -> Iterator[pa.Table]:
    for batch in reader:
        for start in range(0, len(batch), BLOCK_ROWS):
            yield pa.Table.from_batches([batch.slice(start, BLOCK_ROWS)])


def _check_columns(schema: pa.Schema, name: str, provenance: dict[str, Any], problems: dict[str, list[str]]) -> None:
    expected = cache_features(provenance["width"], provenance["dtype"]).arrow_schema
    if schema.names != expected.names:
        problems["columns"].append(f"{name}: {', '.join(schema.names)}, not {', '.join(expected.names)}")
        return
    for found, wanted in zip(schema, expected, strict=True):
        if not found.type.equals(wanted.type):
            problems["columns"].append(f"{name}: {wanted.name} is {found.type}, not {wanted.type}")


def _check_rows(
    table: pa.Table, first_row: int, name: str, provenance: dict[str, Any], problems: dict[str, list[str]]
) -> np.ndarray:
    """Checks the values of a block of rows; returns their activations (N, d), rows that are not finite as zeros."""
    column = table["activation"].combine_chunks()
    activations = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    finite = np.isfinite(activations).all(axis=1)
    if not finite.all():
        rows = first_row + np.flatnonzero(~finite)
        problems["finite values"].append(f"{name}: {_rows(rows)} with NaN or infinity")
        activations = np.where(finite[:, None], activations, 0)
    lengths = np.diff(table["input_ids"].combine_chunks().offsets.to_numpy())
    positions = table["position"].to_numpy()
    wrong = np.flatnonzero(lengths != positions + 1)
    if len(wrong):
        problems["positions"].append(f"{name}: {_rows(first_row + wrong)} whose context is not tokens 0..P")
    least = provenance["positions"]["min_position"]
    early = np.flatnonzero(positions < least)
    if len(early):
        problems["positions"].append(f"{name}: {_rows(first_row + early)} before position {least}")
    return activations


def _rows(rows: np.ndarray) -> str:
    return f"row {rows[0]}" if len(rows) == 1 else f"{len(rows):,} rows from row {rows[0]}"


def _content_checks(path: Path, provenance: dict[str, Any], findings: Sequence[ShardFindings]) -> list[Check]:
    """The findings of all shards, by check; and what is told by all of them together."""
    found: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        for name, problems in finding.problems.items():
            found[name] += problems
    shards = provenance["shards"]
    names = [shard["file"] for shard in shards]
    found["shards"] += [
        f"{file.name}: not in the provenance" for file in sorted(path.glob("shard-*.arrow")) if file.name not in names
    ]
    if sum(shard["rows"] for shard in shards) != provenance["rows"]:
        found["rows"].append(f"the shards have {sum(shard['rows'] for shard in shards):,}, not {provenance['rows']:,}")
    size = sum(shard["bytes"] for shard in shards)
    checks = [
        _found_check("shards", found, f"{len(shards):,} {'file' if len(shards) == 1 else 'files'}, none besides"),
        _found_check("checksums", found, f"sha256 of {size:,} bytes"),
    ]
    passed = {
        "rows": f"{provenance['rows']:,}",
        "columns": f"activation {provenance['dtype']} x {provenance['width']}, input_ids, position, document",
        "finite values": f"{sum(finding.rows for finding in findings) * provenance['width']:,} values",
        "positions": f"tokens 0..P each, P of {provenance['positions']['min_position']} or more",
    }
    if all(finding.readable for finding in findings):
        return [
            *checks,
            *(_found_check(name, found, detail) for name, detail in passed.items()),
            _moments_check(provenance, findings),
        ]
    rows = sum(finding.rows for finding in findings)
    read = f"of {rows:,} of {provenance['rows']:,} rows alone: the rest cannot be read"
    checks += [_found_check(name, found, read, checked=False) for name in passed]
    return [*checks, Check("mean and rms", False, "some shards cannot be read", checked=False)]


def _found_check(name: str, found: Mapping[str, list[str]], otherwise: str, checked: bool = True) -> Check:
    """What was found wrong; where that is nothing, `otherwise`, as passed or as not checked."""
    if found[name]:
        return Check(name, False, "\n".join(found[name]))
    return Check(name, checked, otherwise, checked)


def _moments_check(provenance: dict[str, Any], findings: Sequence[ShardFindings]) -> Check:
    blocks = [block for finding in findings for block in finding.moments]
    moments = merge_moments(blocks)
    largest = MOMENTS_TOLERANCE * moments.rms
    mean = np.array(provenance["mean"])
    problems = []
    if mean.shape != moments.mean.shape:
        problems.append(f"the mean has {len(mean)} dimensions, not {len(moments.mean)}")
    elif not (off := float(np.abs(mean - moments.mean).max())) <= largest:
        problems.append(f"the mean is off by up to {off:.3g} (at most {largest:.2g})")
    if not abs(provenance["rms"] - moments.rms) <= largest:
        problems.append(f"the rms is {moments.rms:.6g}, not {provenance['rms']:.6g}")
    return Check("mean and rms", not problems, "\n".join(problems) or f"computed anew, rms {moments.rms:.6g}")
