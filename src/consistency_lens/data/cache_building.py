"""Building an activation cache: plan the positions, run the subject as far as its layer, write whole shards.

A shard is written under a temporary name, synced and renamed, and the provenance comes last, so a killed build goes on
where it stopped and nothing half-written is ever opened as whole.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..atomic_write import atomic_file, write_json
from ..subject import Subject
from .activation_cache import (
    BLOCK_ROWS,
    BUILDING_FILE,
    PROVENANCE_FILE,
    ActivationCache,
    file_hash,
    read_activations,
    streaming_moments,
    token_lists,
)
from .corpus import CORPUS_FEATURES

logger = logging.getLogger(__name__)

FORMAT = 1
FLOAT16_MAX = 65504.0


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
    sequences_read = {"kept": len(plan.sequences), "skipped_too_short": plan.num_skipped}
    _finish(path, files, settings | {"tokenizer": tokenizer.name_or_path, "sequences": sequences_read})
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
    write_json(path / BUILDING_FILE, settings)
    return False


def _plan_shard(
    corpus: Dataset, sequences: np.ndarray, positions_per_sequence: int, min_position: int, seed: int
) -> _ShardPlan:
    table = _corpus_table(corpus, sequences)
    documents = table["document"].to_numpy()
    contexts, positions = [], []
    for tokens, document, index in zip(token_lists(table), documents, sequences, strict=True):
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
            f"activation cache: {bad_rows} of {len(activations)} activations of layer {layer} are not finite; load "
            "the subject in float32 or bfloat16, or check its weights"
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
    with atomic_file(file) as stream, pa.ipc.new_stream(stream, schema) as writer:
        writer.write_table(table)


def _finish(path: Path, files: list[Path], origin: dict[str, Any]) -> None:
    """Reads every shard once for its checksum and moments and writes the provenance, which makes the cache whole."""
    shards: list[dict[str, Any]] = []

    def blocks() -> Iterator[np.ndarray]:
        for file in files:
            activations = read_activations(file)
            size = file.stat().st_size
            shards.append({"file": file.name, "rows": len(activations), "bytes": size, "sha256": file_hash(file)})
            yield activations

    moments = streaming_moments(blocks())
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, pa, np)}
    provenance = origin | {
        "rows": sum(shard["rows"] for shard in shards),
        "mean": moments.mean.tolist(),
        "rms": moments.rms,
        "shards": shards,
        "versions": {"python": platform.python_version()} | versions,
    }
    write_json(path / PROVENANCE_FILE, provenance)
    (path / BUILDING_FILE).unlink()


def _corpus_table(corpus: Dataset, indices: np.ndarray) -> pa.Table:
    return corpus.select_columns(list(CORPUS_FEATURES)).with_format("arrow")[indices]
