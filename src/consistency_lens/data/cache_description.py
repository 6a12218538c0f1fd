"""What an activation cache holds, in figures: from its provenance, and from one pass over its rows."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..fingerprints import tokenizer_hash
from .activation_cache import ActivationCache
from .cache_folder import norms
from .dataset_reading import cause_of

logger = logging.getLogger(__name__)

POSITION_QUANTILES = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}
NORM_QUANTILES = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99}
NORM_QUANTILES |= {"99.9%": 0.999, "max": 1}
OUTLIER_FACTOR = 10  # times the median norm: such rows are massive activations
LOG_FACTOR = 10  # a histogram is log-spaced if its largest norm is this many times the smallest
NUM_BINS = 24
BLOCK_ROWS = 1024  # read at a time
SPACE_MARKS = "▁Ġ"  # a space, as sentencepiece and byte-level vocabularies spell it

# what was read of a source -> what that is called
SOURCE_FACTS = {"dataset_config": "config", "dataset_split": "split", "text_column": "column"}
SOURCE_FACTS |= {"messages_column": "messages in"}
# taken from the provenance as they are
FACTS = (
    "subject",
    "subject_revision",
    "tokenizer",
    "layer",
    "width",
    "dtype",
    "positions",
    "dataset",
    "dataset_revision",
    "dataset_split",
    "corpus",
    "sequences",
    "seed",
    "max_norm",
    "norm_filter",
    "rms",
    "loaded_as",
    "pulled_from",
)


class ReadRows(NamedTuple):
    """What one pass over a cache keeps of each of its N rows: 12 bytes."""

    norms: np.ndarray
    """(N,) float32."""
    positions: np.ndarray
    """(N,) int32."""
    tokens: np.ndarray
    """The token at P, (N,) int32."""
    documents: int
    """Distinct ones."""


def describe_cache(
    cache: ActivationCache,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top_tokens: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures of a cache, in what JSON can hold. Norms are those of the activations as stored.

    Args:
        tokenizer: decodes the tokens; without it they are ids alone.
        top_tokens: how many of the most frequent tokens at P are listed, and how many of the outliers'.

    Returns:
        `path`, what the provenance says (`FACTS`), `rows`, `documents`, `context_tokens`
        (stored, of all rows), `disk` (bytes, bytes_per_row, shards),
        `position` and `norm` (quantiles), `norm_histogram` (log_spaced, edges, rows), `outliers` (rows beyond ten
        times the median norm: threshold, rows, tokens, positions) and `tokens` (id, text, rows, share, mean_norm).
    """
    provenance = cache.provenance
    read = _read_rows(cache, progress)
    size = sum(shard["bytes"] for shard in provenance["shards"])
    norm = _quantiles(read.norms, NORM_QUANTILES)
    return {
        "path": str(cache.path),
        **{name: provenance[name] for name in FACTS if provenance.get(name) is not None},
        "rows": len(cache),
        "documents": read.documents,
        "context_tokens": int(read.positions.sum(dtype=np.int64)) + len(cache),
        "disk": {"bytes": size, "bytes_per_row": size / len(cache), "shards": len(provenance["shards"])},
        "position": _quantiles(read.positions, POSITION_QUANTILES),
        "norm": norm | {"mean": float(read.norms.mean(dtype=np.float64))},
        "norm_histogram": norm_histogram(read.norms),
        "outliers": _outliers(read, OUTLIER_FACTOR * norm["median"], tokenizer, top_tokens),
        "tokens": _token_table(read, tokenizer, top_tokens),
    }


def load_cache_tokenizer(provenance: Mapping[str, Any], name: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a cache was made with.

    Args:
        name: Hub id or folder; by default the one that the provenance names, and None is returned where that cannot
            be loaded, was a folder elsewhere, or is another one by now: token texts would be wrong.

    Raises:
        ValueError: if the tokenizer that is asked for cannot be loaded, or is not that of the cache.
    """
    key = "tokenizer" if provenance.get("tokenizer") else "subject"
    source = name or provenance[key]
    if name is None and key in provenance.get("local", ()):
        logger.info("the tokenizer was a folder where the cache was made: tokens are shown by their ids")
        return None
    revision = provenance.get("subject_revision") if source == provenance["subject"] else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        cause = cause_of(error)
        if name is not None:
            raise ValueError(f"tokenizer: cannot load {name!r}; pass a Hub id or a folder ({cause})") from error
        logger.info("no tokenizer at %s: tokens are shown by their ids (%s)", source, cause)
        return None
    if tokenizer_hash(tokenizer) == provenance["tokenizer_hash"]:
        return tokenizer
    if name is not None:
        raise ValueError(f"tokenizer: {name!r} is not the one that the cache was made with; pass that one")
    logger.warning("the tokenizer of %s is not that of the cache: tokens are shown by their ids", source)
    return None


def norm_histogram(values: np.ndarray, bins: int = NUM_BINS) -> dict[str, Any]:
    """Rows by norm, log-spaced where the norms span more than a factor of ten, so that massive activations show.

    Returns:
        `log_spaced`, `edges` (bins + 1) and `rows` (bins).
    """
    low, high = float(values.min()), float(values.max())
    log_spaced = low > 0 and high > LOG_FACTOR * low
    edges = np.geomspace(low, high, bins + 1) if log_spaced else np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = low, high
    if low == high:
        edges, counts = np.array([low, high]), np.array([len(values)])
    else:
        counts = np.histogram(values.astype(np.float64), edges)[0]
    return {"log_spaced": log_spaced, "edges": edges.tolist(), "rows": counts.tolist()}


def corpus_facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the text of a cache was made into sequences, as label and value; empty where it does not say."""
    corpus = provenance.get("corpus")
    if corpus is None:
        return []
    source = [f"{name} {corpus[key]}" for key, name in SOURCE_FACTS.items() if corpus.get(key) is not None]
    if corpus["max_length"] is None:
        made = "a whole document each"
    else:
        made = f"at most {corpus['max_length']:,} tokens, longer documents {corpus['long_documents']}"
    made += ", packed" if corpus["packing"] else ""
    return [*([("read of the text", ", ".join(source))] if source else []), ("a sequence is", made)]


def _read_rows(cache: ActivationCache, progress: bool) -> ReadRows:
    """One pass over the shards."""
    found_norms, positions, tokens, documents = [], [], [], []
    bar = tqdm(cache.provenance["shards"], desc="describing", unit=" shards", disable=not progress)
    for shard in bar:
        seen = []
        with pa.memory_map(str(cache.path / shard["file"])) as stream:
            for batch in pa.ipc.open_stream(stream):
                for start in range(0, len(batch), BLOCK_ROWS):
                    block = batch.slice(start, BLOCK_ROWS)
                    activations = block["activation"].flatten().to_numpy(zero_copy_only=False)
                    found_norms.append(norms(activations.reshape(len(block), -1)).astype(np.float32))
                    positions.append(block["position"].to_numpy().copy())
                    contexts = block["input_ids"]
                    tokens.append(contexts.values.to_numpy()[contexts.offsets.to_numpy()[1:] - 1])
                    seen.append(block["document"].to_numpy())
        documents.append(np.unique(np.concatenate(seen)) if seen else np.empty(0, dtype=np.int64))
    return ReadRows(
        np.concatenate(found_norms),
        np.concatenate(positions),
        np.concatenate(tokens),
        len(np.unique(np.concatenate(documents))),
    )


def _quantiles(values: np.ndarray, names: Mapping[str, float]) -> dict[str, float]:
    found = np.quantile(values, list(names.values()), method="nearest")
    return dict(zip(names, found.tolist(), strict=True))


def _outliers(read: ReadRows, threshold: float, tokenizer: PreTrainedTokenizerBase | None, top: int) -> dict[str, Any]:
    rows = np.flatnonzero(read.norms > threshold)
    few = ReadRows(read.norms[rows], read.positions[rows], read.tokens[rows], 0)
    positions, counts = np.unique(few.positions, return_counts=True)
    order = np.lexsort((positions, -counts))[:top]
    return {
        "threshold": threshold,
        "rows": len(rows),
        "tokens": _token_table(few, tokenizer, top),
        "positions": [{"position": int(positions[n]), "rows": int(counts[n])} for n in order],
    }


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as it reads within a text: with the spaces that it starts with, which `decode` drops of a first one."""
    text, piece = str(tokenizer.decode([token])), tokenizer.convert_ids_to_tokens([token])[0] or ""
    spaces = len(piece) - len(piece.lstrip(SPACE_MARKS))
    return " " * spaces + text.lstrip(" ") if spaces else text


def _token_table(read: ReadRows, tokenizer: PreTrainedTokenizerBase | None, top: int) -> list[dict[str, Any]]:
    """The most frequent tokens at P, first those with most rows."""
    ids, group, counts = np.unique(read.tokens, return_inverse=True, return_counts=True)
    sums = np.bincount(group, weights=read.norms, minlength=len(ids))
    order: Sequence[int] = np.lexsort((ids, -counts))[:top].tolist()
    return [
        {
            "id": int(ids[n]),
            "text": None if tokenizer is None else token_text(tokenizer, int(ids[n])),
            "rows": int(counts[n]),
            "share": float(counts[n] / len(read.tokens)),
            "mean_norm": float(sums[n] / counts[n]),
        }
        for n in order
    ]
