"""Is a cache what a subject gives? Hashes, and some of its rows computed anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ..fingerprints import tokenizer_hash, weights_hash
from ..residual_stream import ResidualStream
from .activation_cache import token_lists
from .activation_reading import ActivationReader
from .cache_check import Check
from .cache_folder import norms
from .cache_plan import ShardPlan
from .subject_loading import LoadedSubject

BATCH_SIZE = 8  # of the longest contexts that are run anew
# What is read anew is off by the rounding of each block, which adds up like a random walk, and by that of the stored
# dtype. In float32 it is the order of the sums that differs between devices and batches. Single rows go further than
# most: on a trained model the worst of a bfloat16 run was off by 8 roundings times the square root of the blocks.
ROUNDINGS_PER_BLOCK = 4
FLOAT32_TOLERANCE = 1e-4
SINGLE_ROW_FACTOR = 4


class LoadedWeights(NamedTuple):
    """A subject and what is compared of it, computed once for all the caches that are verified against it."""

    stream: ResidualStream
    weights_hash: str
    tokenizer_hash: str
    dtype: str


def load_weights(subject: LoadedSubject, blocks: str | None = None) -> LoadedWeights:
    """What a cache is compared with of a subject; reads all its weights."""
    return LoadedWeights(
        ResidualStream(subject.model, blocks=blocks),
        weights_hash(subject.model),
        tokenizer_hash(subject.tokenizer),
        str(subject.model.dtype).removeprefix("torch."),
    )


def subject_checks(
    path: Path,
    provenance: dict[str, Any],
    readable: Sequence[bool],
    subject: LoadedWeights,
    sample_rows: int,
) -> list[Check]:
    """Whether a cache is a subject's: its weights, its tokenizer, and the activations of some rows computed anew.

    Args:
        path: folder of the cache.
        readable: of each shard whether its rows can be relied on.
        sample_rows: how many rows are computed anew.
    """
    checks = [_weights_check(provenance, subject), _hash_check("tokenizer", provenance, subject.tokenizer_hash)]
    stream, layer = subject.stream, provenance["layer"]
    if (width := stream.width) != provenance["width"] or layer >= stream.num_layers:
        detail = f"width {width} and {stream.num_layers} blocks, not width {provenance['width']} and a block {layer}"
        return [*checks, Check("activations", False, detail)]
    sample = _sample(path, provenance["shards"], readable, sample_rows)
    if not sample:
        return [*checks, Check("activations", False, "no rows can be read", checked=False)]
    return [*checks, _activations_check(sample, provenance, subject)]


def _weights_check(provenance: dict[str, Any], subject: LoadedWeights) -> Check:
    made_in = made_as(provenance)["dtype"]
    if made_in is not None and made_in != subject.dtype:
        return Check("weights", True, f"not compared: loaded in {subject.dtype}, the cache was made in {made_in}")
    return _hash_check("weights", provenance, subject.weights_hash)


def _hash_check(what: str, provenance: dict[str, Any], found: str) -> Check:
    expected = provenance[f"{what}_hash"]
    detail = f"hash {found[:12]}…" if found == expected else f"hash {found[:12]}…, not {expected[:12]}…"
    return Check(what, found == expected, detail)


def made_as(provenance: dict[str, Any]) -> dict[str, str | None]:
    """`dtype` and `quantization` of the subject when its activations were cached; None where it is not known."""
    loaded_as = provenance.get("loaded_as") or {}
    quantization = loaded_as.get("quantization") or {}
    bits = {"load_in_8bit": "8bit", "load_in_4bit": "4bit"}
    return {
        "dtype": loaded_as.get("dtype"),
        "quantization": next((name for key, name in bits.items() if quantization.get(key)), None),
    }


class SampledRow(NamedTuple):
    """A row that is computed anew."""

    name: str
    context: np.ndarray
    activation: np.ndarray
    """(d,) float64, as stored."""


def _sample(
    path: Path, shards: Sequence[dict[str, Any]], readable: Sequence[bool], sample_rows: int
) -> list[SampledRow]:
    """Rows spread evenly over the readable shards."""
    usable = [shard for shard, can in zip(shards, readable, strict=True) if can and shard["rows"]]
    ends = np.cumsum([shard["rows"] for shard in usable])
    if not len(ends) or sample_rows < 1:
        return []
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(sample_rows, int(ends[-1]))).astype(np.int64))
    places = np.searchsorted(ends, chosen, side="right")
    rows: list[SampledRow] = []
    for place in np.unique(places):
        shard = usable[place]
        own = chosen[places == place] - (ends[place] - shard["rows"])
        with pa.memory_map(str(path / shard["file"])) as stream:
            whole = pa.ipc.open_stream(stream).read_all()
            table = pa.concat_tables([whole.slice(int(row), 1) for row in own]).combine_chunks()
        activations = table["activation"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors = activations.reshape(len(own), -1).astype(np.float64)
        names = [f"row {row} of {shard['file']}" for row in own]
        rows += map(SampledRow, names, token_lists(table), vectors)
    return rows


def tolerance(dtype: str, computed_in: Sequence[str], layer: int) -> float:
    """The largest median of the relative errors |A - A'| / |A| of rows that are computed anew.

    A single row may be off by `SINGLE_ROW_FACTOR` times as much.

    Args:
        dtype: of the stored activations: rounded to half a unit in the last place.
        computed_in: the dtypes of the subject, then and now. In a half each block rounds the residual stream several
            times, which adds up with the square root of the blocks.
        layer: the block that is read.
    """
    rounding = {name: torch.finfo(getattr(torch, name)).eps / 2 for name in {dtype, *computed_in}}
    computed = ROUNDINGS_PER_BLOCK * np.sqrt(layer + 1) * max(rounding[name] for name in computed_in)
    return rounding[dtype] + max(FLOAT32_TOLERANCE, float(computed))


def _activations_check(sample: Sequence[SampledRow], provenance: dict[str, Any], subject: LoadedWeights) -> Check:
    """Runs the subject over the contexts of some rows and compares what it gives with what is stored."""
    vocab_size = subject.stream.input_embedding.get_parameter("weight").shape[0]
    largest_token = max(int(row.context.max()) for row in sample)
    if largest_token >= vocab_size:
        detail = f"a context has token {largest_token}, but the subject's vocabulary is {vocab_size}"
        return Check("activations", False, detail)
    plan = ShardPlan(
        [row.context for row in sample],
        [np.array([len(row.context) - 1]) for row in sample],
        np.zeros(len(sample), dtype=np.int64),
    )
    try:
        (anew,) = ActivationReader(subject.stream, BATCH_SIZE).read(plan, [provenance["layer"]])
    except ValueError as error:
        return Check("activations", False, str(error))
    stored = np.stack([row.activation for row in sample])
    errors = norms(stored - anew) / np.maximum(norms(anew), np.finfo(np.float32).tiny)
    computed_in = [subject.dtype, made_as(provenance)["dtype"] or subject.dtype]
    largest = tolerance(provenance["dtype"], computed_in, provenance["layer"])
    wrong = np.flatnonzero(~(errors <= SINGLE_ROW_FACTOR * largest))
    median = float(np.median(errors))
    found = f"relative error: median {median:.2g}, worst {errors.max():.2g}"
    allowed = f"at most {largest:.2g} and {SINGLE_ROW_FACTOR * largest:.2g} for {provenance['dtype']} stored and "
    allowed += f"{' and '.join(dict.fromkeys(computed_in))} run"
    if len(wrong):
        head = f"{len(wrong)} of {len(sample)} rows differ, the first is {sample[wrong[0]].name}"
    else:
        head = f"{len(sample)} rows computed anew"
    return Check("activations", not len(wrong) and median <= largest, f"{head}; {found} ({allowed})")
