"""Building activation caches: run the subject as far as its highest layer, write whole shards, on any number of ranks.

Each rank owns every n-th shard. What a shard holds follows from the plan alone, and what is done from the folder, so
the finished cache does not depend on how many ranks built it, or how often they were killed. While the subject reads
one shard, a thread writes the one before.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..context_length import context_length
from ..fingerprints import tokenizer_hash, weights_hash
from ..residual_stream import ResidualStream
from ..subject import Subject
from .activation_cache import ActivationCache
from .activation_reading import ActivationReader
from .cache_folder import CacheFolder, norms
from .cache_plan import POSITIONS_RULE, CachePlan, ShardPlan, plan_cache
from .corpus import CORPUS_FEATURES

FORMAT = 1
STORED_DTYPES = ("float16", "float32")
# Sequences whose rows give the median norm that `max_norm` multiplies, and the digits that are kept of it: so few
# that the rounding of another batch size or device does not show.
NORM_SEQUENCES, NORM_DIGITS = 512, 4


def build_activation_cache(subject: Subject, corpus: Dataset, path: str | Path, **settings: Any) -> ActivationCache:
    """Caches a subject's activations at its layer; the one-layer form of `build_activation_caches`.

    Args:
        path: folder of the cache.
        settings: the keyword arguments of `build_activation_caches`.

    Raises:
        ValueError, CacheWriteError: as there.
    """
    return build_activation_caches(subject.stream, corpus, {subject.layer: path}, **settings)[subject.layer]


def build_activation_caches(
    stream: ResidualStream,
    corpus: Dataset,
    paths: Mapping[int, str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    subject_name: str,
    dataset_name: str,
    subject_revision: str | None = None,
    subject_hash: str | None = None,
    dataset_revision: str | None = None,
    dataset_split: str | None = None,
    corpus_facts: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    positions_per_sequence: int = 1,
    min_position: int = 8,
    dtype: str = "float16",
    max_norm: float | None = None,
    batch_size: int = 32,
    rows_per_shard: int = 8192,
    seed: int = 0,
    progress: bool = True,
    state: PartialState | None = None,
) -> dict[int, ActivationCache]:
    """Runs a subject once over a corpus and caches its activations at random positions, one cache for each layer.

    From each sequence of S tokens come K = `positions_per_sequence` rows (fewer where it has no more positions), at
    distinct positions uniform in [min_position, S - 2]. They depend on the seed, the document and the sequence's index
    in the corpus, and on nothing else; their order is that of the corpus. Sequences too short for one position are
    skipped and counted. The activations depend on `batch_size` only by rounding. A build that was killed goes on when
    started again with the same arguments; a finished one is opened. What subject and data set are called is told in
    the provenance, but does not decide whether it is the same cache: their hashes do.

    Args:
        stream: of the subject, in evaluation mode. Blocks above the highest layer and the head do not run.
        corpus: see `data.corpus`; columns `input_ids` and `document`.
        paths: layer -> folder of its cache.
        tokenizer: the one that made the corpus, for the provenance.
        subject_hash: `weights_hash` of the subject, if it is known already.
        corpus_facts: how the text was made into sequences, for the provenance; see `tokenized_corpus.CorpusOrigin`.
        arguments: what started the build, in what JSON can hold; written beside the shards before the first of them,
            so that an unfinished build says how it goes on.
        dtype: of the stored activations, "float16" or "float32".
        max_norm: drop the rows whose norm is above this many times the median norm (massive activations), and count
            them. The median is that of the rows of up to 512 sequences, spread over the corpus, to four digits.
        batch_size: sequences of the longest kind in one forward pass of the subject; of shorter ones as many more as
            make the same number of tokens.
        rows_per_shard: about how many rows a file holds, hence how many a killed build may lose.
        state: with it, its processes share the work; all of them call this function with the same arguments, subject
            and corpus.

    Raises:
        ValueError: for a bad argument, an empty corpus or one without a long enough sequence, tokens or a tokenizer
            beyond the subject's vocabulary, sequences beyond its context, activations that are not finite or overflow
            float16, a folder that holds a cache built with other settings, or in which another build is at work, and
            processes that do not agree in what they build.
        CacheWriteError: if a file cannot be written, as when the disk is full.
    """
    for layer in paths:
        stream.check_layer(layer)
    check_settings(positions_per_sequence, min_position, dtype, max_norm, batch_size, rows_per_shard)
    _check_corpus(corpus)
    plan = plan_cache(
        corpus,
        positions_per_sequence=positions_per_sequence,
        min_position=min_position,
        rows_per_shard=rows_per_shard,
        seed=seed,
        vocab_size=_vocab_size(stream, tokenizer),
        max_length=context_length(stream.decoder.config),
    )
    settings = _settings(stream, tokenizer, plan, subject_hash, dtype, max_norm, dataset_split, rows_per_shard)
    folders = [CacheFolder(Path(path), {**settings, "layer": layer}) for layer, path in sorted(paths.items())]
    facts = _origin(tokenizer, subject_name, subject_revision, dataset_name, dataset_revision, corpus_facts)
    _Build(stream, plan, batch_size, progress, state).run(folders, facts, arguments)
    return {folder.layer: ActivationCache.open(folder.path) for folder in folders}


def check_settings(
    positions_per_sequence: int,
    min_position: int,
    dtype: str,
    max_norm: float | None,
    batch_size: int,
    rows_per_shard: int,
) -> None:
    """Checks those arguments of `build_activation_caches` that need neither subject nor corpus.

    Raises:
        ValueError: naming the first that is wrong.
    """
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
    if dtype not in STORED_DTYPES:
        raise ValueError(f"activation cache: dtype must be 'float16' or 'float32', got {dtype!r}")
    if max_norm is not None and not max_norm >= 2:
        raise ValueError(
            f"activation cache: max_norm is a multiple of the median norm and must be at least 2, got {max_norm}; "
            "try 10, or leave it out to keep every row"
        )


class _Build:
    """The work of one rank, in its order: claim the folders, write the own shards, and, on the first, finish."""

    def __init__(
        self, stream: ResidualStream, plan: CachePlan, batch_size: int, progress: bool, state: PartialState | None
    ) -> None:
        self.reader = ActivationReader(stream, batch_size)
        self.plan = plan
        self.state = state
        self.rank = 0 if state is None else state.process_index
        self.num_ranks = 1 if state is None else state.num_processes
        self.is_main = self.rank == 0
        self.progress = progress and self.is_main

    def run(self, folders: Sequence[CacheFolder], facts: dict[str, Any], arguments: Mapping[str, Any] | None) -> None:
        """Builds all caches that are not finished; `facts` go into their provenance, `arguments` beside them."""
        with ExitStack() as locks:
            if not self.is_main:
                self._wait()
            unfinished = self._claim(folders, locks, arguments)
            if self.is_main:
                self._measure_norms(unfinished)
                self._wait()
            if unfinished:
                self._write_shards(unfinished)
            self._wait()
            if self.is_main:
                for folder in unfinished:
                    folder.finish(len(self.plan.shard_rows), facts | self._facts())
                for folder in folders:
                    folder.remove_leftovers()
            self._wait()

    def _wait(self) -> None:
        """Waits until every rank has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def _claim(
        self, folders: Sequence[CacheFolder], locks: ExitStack, arguments: Mapping[str, Any] | None
    ) -> list[CacheFolder]:
        """The folders that are not finished, made those of this build; the first rank keeps other builds out."""
        unfinished = []
        for folder in folders:
            if self.is_main and not folder.is_finished():
                locks.enter_context(folder.locked())
            # asked again, as another build may have had the lock until now
            if not folder.is_finished():
                if self.is_main:
                    folder.claim(len(self.plan.shard_rows), arguments)
                else:
                    folder.join()
                unfinished.append(folder)
        return unfinished

    def _measure_norms(self, folders: Sequence[CacheFolder]) -> None:
        """Fixes the median norm of each folder that drops rows by it and does not have it yet."""
        waiting = [
            folder for folder in folders if folder.settings["max_norm"] is not None and folder.median_norm is None
        ]
        if waiting:
            sample = self.plan.sample(NORM_SEQUENCES)
            found = self.reader.read(sample, [folder.layer for folder in waiting])
            for folder, activations in zip(waiting, found, strict=True):
                folder.keep_median_norm(float(f"{np.median(norms(activations)):.{NORM_DIGITS}g}"))

    def _write_shards(self, folders: Sequence[CacheFolder]) -> None:
        """Writes those of the rank's own shards that are missing; each is run once for all layers that miss it."""
        own = range(self.rank, len(self.plan.shard_rows), self.num_ranks)
        missing = {index: [folder for folder in folders if not folder.has_shard(index)] for index in own}
        rows = {index: int(self.plan.shard_rows[index]) for index in own}
        done = sum(rows[index] for index in own if not missing[index])
        written: Future[None] | None = None
        split = folders[0].settings["dataset_split"]
        with self._bar(split, sum(rows.values()), done) as bar, ThreadPoolExecutor(max_workers=1) as writer:
            count = _Counter(bar)
            for index in own:
                if not missing[index]:
                    continue
                shard = self.plan.shard(index)
                found = self.reader.read(shard, [folder.layer for folder in missing[index]], count)
                if written is not None:
                    # raises what went wrong, and keeps all but two shards out of memory
                    written.result()
                written = writer.submit(_write, missing[index], index, shard, found)
            if written is not None:
                written.result()

    def _bar(self, split: str | None, rows: int, done: int) -> tqdm:
        """A bar over the rows of this rank; the others, with as many, are about as far."""
        what = "caching activations" + (f" of {split}" if split is not None else "")
        share = f", rank 1 of {self.num_ranks}" if self.num_ranks > 1 else ""
        return tqdm(
            total=rows,
            initial=done,
            desc=f"{what}{share}",
            unit=" rows",
            disable=not self.progress,
            smoothing=0,  # long sequences come first in each shard: the rate of the last batches says little
        )

    def _facts(self) -> dict[str, Any]:
        """What was read, and how the subject was loaded."""
        model = self.reader.stream.model
        return {
            "sequences": {"kept": len(self.plan.sequences), "skipped_too_short": self.plan.num_skipped},
            "loaded_as": {
                "dtype": str(model.dtype).removeprefix("torch."),
                "attention": model.config._attn_implementation,
                "quantization": model.config.to_dict().get("quantization_config"),
            },
        }


class _Counter:
    """Counts what a batch has done, on a bar that says how many tokens the subject reads in a second."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.tokens = 0
        self.start = time.perf_counter()

    def __call__(self, rows: int, tokens: int) -> None:
        self.tokens += tokens
        speed = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(rows)


def _write(folders: Sequence[CacheFolder], index: int, shard: ShardPlan, found: Sequence[np.ndarray]) -> None:
    """Writes a shard of each layer."""
    for folder, activations in zip(folders, found, strict=True):
        folder.write_shard(index, shard, activations)


def _settings(
    stream: ResidualStream,
    tokenizer: PreTrainedTokenizerBase,
    plan: CachePlan,
    subject_hash: str | None,
    dtype: str,
    max_norm: float | None,
    dataset_split: str | None,
    rows_per_shard: int,
) -> dict[str, Any]:
    """All that the rows of every layer depend on: with the layer, what tells one cache from another."""
    return {
        "format": FORMAT,
        "weights_hash": subject_hash or weights_hash(stream.model),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "width": stream.width,
        "positions": {
            "rule": POSITIONS_RULE,
            "per_sequence": plan.positions_per_sequence,
            "min_position": plan.min_position,
        },
        "dtype": dtype,
        "max_norm": max_norm,
        "dataset_split": dataset_split,
        "dataset_hash": plan.dataset_hash,
        "seed": plan.seed,
        "rows_per_shard": rows_per_shard,
    }


def _origin(
    tokenizer: PreTrainedTokenizerBase,
    subject_name: str,
    subject_revision: str | None,
    dataset_name: str,
    dataset_revision: str | None,
    corpus_facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What subject and text are called, and how the text was made into sequences; told, and compared with nothing."""
    origin: dict[str, Any] = {
        "subject": subject_name,
        "subject_revision": subject_revision,
        "tokenizer": tokenizer.name_or_path,
        "dataset": dataset_name,
        "dataset_revision": dataset_revision,
    }
    return origin if corpus_facts is None else origin | {"corpus": dict(corpus_facts)}


def _check_corpus(corpus: Dataset) -> None:
    missing = [name for name in CORPUS_FEATURES if name not in corpus.column_names]
    if missing:
        raise ValueError(f"activation cache: the corpus lacks {missing}, it has {corpus.column_names}; tokenise it")
    if len(corpus) == 0:
        raise ValueError("activation cache: the corpus is empty; pass at least one sequence")


def _vocab_size(stream: ResidualStream, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the subject knows: the rows of its embedding.

    Raises:
        ValueError: if the tokenizer has more.
    """
    vocab_size = stream.input_embedding.get_parameter("weight").shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"activation cache: the tokenizer has {len(tokenizer)} tokens, but the subject only {vocab_size}; "
            "pass the subject's own tokenizer"
        )
    return vocab_size
