"""Caches as they are published, but in memory: parquet files, their checksums, and which of them were read."""

import hashlib
import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from consistency_lens.data.streaming import StreamedActivations


class Published:
    """The files of one split, from the tables of its shards."""

    def __init__(self, tables, provenance):
        self.files, self.read, self.lock = {}, [], threading.Lock()
        entries = []
        for number, table in enumerate(tables):
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            content, name = buffer.getvalue(), f"data/train-{number:05d}.parquet"
            self.files[name] = content
            digest = hashlib.sha256(content).hexdigest()
            entries.append({"file": name, "rows": len(table), "bytes": len(content), "sha256": digest})
        self.provenance = provenance | {"parquet": entries}

    def read_file(self, name):
        with self.lock:
            self.read.append(name)
        return self.files[name]

    def stream(self, **settings):
        return StreamedActivations(self.provenance, self.read_file, **({"window": 2} | settings))


def numbered_table(rows, width, document_of):
    """Rows of which each holds its own number, in a context of 1 to 5 tokens."""
    values = np.repeat(np.array(rows, dtype=np.float32), width)
    contexts = [[row % 7] * (1 + row % 5) for row in rows]
    return pa.table(
        {
            "activation": pa.FixedSizeListArray.from_arrays(pa.array(values), width),
            "input_ids": pa.array(contexts, pa.list_(pa.int32())),
            "position": pa.array([row % 5 for row in rows], pa.int32()),
            "document": pa.array([document_of(row) for row in rows], pa.int64()),
            "text": pa.array(["words"] * len(rows)),
        }
    )


def published(cache, num_shards=4):
    """An activation cache, published in so many files."""
    parts = np.array_split(np.arange(len(cache)), num_shards)
    tables = [cache.dataset.select(part).with_format("arrow")[:] for part in parts]
    return Published(tables, cache.provenance)
