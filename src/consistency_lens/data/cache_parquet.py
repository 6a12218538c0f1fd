"""The shards of an activation cache as parquet files, the form in which it is published, and back.

One parquet file for each Arrow shard, in order, with the same rows in the same order and the same columns; `text`, the
decoded context, may stand beside them for the eye of a reader, and is dropped on the way back.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerBase

from ..atomic_write import atomic_file
from ..hub_connection import asking_hub, first_line
from .activation_cache import file_hash, is_sha256, token_lists

DTYPES = ("float16", "float32")
PARQUET_PATTERN = r"data/[\w.-]+\.parquet"
# A row group is what a viewer reads to show one row, and a stream to read on.
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 512, 1 << 20
COMPRESSION = "zstd"
FEW_VALUES = ["position", "document", "input_ids.list.element"]  # worth a dictionary; activations are not


def published_provenance(repo: str, split: str, commit: str) -> dict[str, Any]:
    """The provenance of a split on the Hub, with its parquet files under `parquet`.

    Raises:
        ValueError: if there is none, or it is not that of a cache in parquet.
        HubError: if the Hub cannot be reached, or fails.
    """
    name = f"provenance/{split}.json"
    with asking_hub(repo, commit):
        file = HfApi().hf_hub_download(repo, name, repo_type="dataset", revision=commit)
    try:
        provenance = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"repo: {name} of {repo!r} is no JSON ({error}); publish it anew") from error
    parts = provenance.get("parquet") if isinstance(provenance, dict) else None
    if not isinstance(parts, list) or not parts or not all(map(_is_part, parts)):
        raise ValueError(f"repo: {name} of {repo!r} names no parquet files of a cache; publish it anew")
    if not all(_is_count(provenance.get(key)) for key in ("layer", "width", "rows")):
        raise ValueError(f"repo: {name} of {repo!r} has no layer, width or number of rows; publish it anew")
    if provenance.get("dtype") not in DTYPES:
        raise ValueError(f"repo: {name} of {repo!r} has the dtype {provenance.get('dtype')!r}; publish it anew")
    return provenance


def _is_part(part: Any) -> bool:
    """Whether this is the record of a parquet file; its name and its checksum come from outside, and become paths."""
    return (
        isinstance(part, dict)
        and isinstance(part.get("file"), str)
        and re.fullmatch(PARQUET_PATTERN, part["file"]) is not None
        and is_sha256(part.get("sha256"))
        and _is_count(part.get("bytes"))
        and _is_count(part.get("rows"))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def write_parquet(
    shard: Path, target: Path, features: Features, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Writes an Arrow shard as a parquet file, whole or not at all; holds one row group in memory.

    Args:
        shard: of a cache.
        target: the file.
        features: `cache_features` of the cache, with the text if a tokenizer is given.
        tokenizer: decodes the contexts.

    Returns:
        `file` (its name), `rows`, `bytes`, `sha256`, and `num_bytes`, the size of its rows in memory.
    """
    schema = features.arrow_schema
    rows = num_bytes = 0
    with atomic_file(target) as stream, _writer(stream, schema) as writer:
        for block in _row_groups(shard):
            columns = [block[name].combine_chunks() for name in block.column_names]
            if tokenizer is not None:
                columns.append(pa.array(decoded(block, tokenizer), pa.string()))
            table = pa.Table.from_arrays(columns, schema=schema)
            writer.write_table(table, row_group_size=len(table))
            rows += len(table)
            num_bytes += table.nbytes
    return {
        "file": target.name,
        "rows": rows,
        "bytes": target.stat().st_size,
        "sha256": file_hash(target),
        "num_bytes": num_bytes,
    }


def decoded(table: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The context of each row as text, special tokens too."""
    return tokenizer.batch_decode([tokens.tolist() for tokens in token_lists(table)])


def read_parquet(file: Path, features: Features) -> pa.Table:
    """The rows of a parquet file as the table of a shard, without the text.

    Args:
        file: that `write_parquet` wrote.
        features: `cache_features` of the cache.

    Raises:
        ValueError: if it is no parquet file, or its columns are not those of the features.
    """
    schema = features.arrow_schema
    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read(columns=schema.names)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"cannot read {file.name!r} as parquet ({first_line(error)})") from error
    found, wanted = ({field.name: field.type for field in of} for of in (table.schema, schema))
    if found != wanted:
        raise ValueError(f"{file.name!r} has columns {_types(found)}, not {_types(wanted)}")
    return pa.Table.from_arrays([table[name].combine_chunks() for name in schema.names], schema=schema)


def write_shard(table: pa.Table, target: Path) -> dict[str, Any]:
    """Writes rows as an Arrow shard of a cache, whole or not at all.

    Returns:
        The shard's record: `file` (its name), `rows`, `bytes` and `sha256`.
    """
    with atomic_file(target) as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return {
        "file": target.name,
        "rows": len(table),
        "bytes": target.stat().st_size,
        "sha256": file_hash(target),
    }


def _writer(stream: Any, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(stream, schema, compression=COMPRESSION, use_dictionary=FEW_VALUES, write_page_index=True)


def _row_groups(shard: Path) -> Iterator[pa.Table]:
    """The rows of a shard in pieces of at most `ROW_GROUP_ROWS` rows and about `ROW_GROUP_BYTES`."""
    with pa.memory_map(str(shard)) as stream:
        table = pa.ipc.open_stream(stream).read_all()
        bytes_per_row = max(1, table.nbytes // max(1, len(table)))
        rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // bytes_per_row))
        for start in range(0, len(table), rows):
            yield table.slice(start, rows)


def _types(columns: dict[str, pa.DataType]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns.items())
