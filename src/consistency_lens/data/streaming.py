"""A published cache, streamed: its shards come from the Hub when training reaches them, and go when it has passed.

The rows are numbered as in the cache, so an epoch is an order of numbers (`StreamSampler`) that follows from the seed
alone: training can stop anywhere and go on at the very row, and skipping to it downloads nothing.
"""

import io
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi

from ..hub_connection import HubError, asking_hub
from .activation_cache import activation_matrix, token_lists
from .activation_source import pair_documents
from .cache_parquet import published_provenance

logger = logging.getLogger(__name__)

COLUMNS = ["activation", "input_ids", "document"]
LOADING_THREADS = 2
RETRY_SECONDS = (5, 15, 60)


@dataclass
class Shard:
    """The rows of one file; `others` are the activations that A' is taken from, by index."""

    activations: np.ndarray
    contexts: list[np.ndarray]
    documents: np.ndarray
    others: np.ndarray | None = None
    partners: np.ndarray | None = None


class StreamedActivations(torch.utils.data.Dataset):
    """The rows of one split of a published cache, as `ActivationRows` gives them; a few shards are held in memory.

    Args:
        provenance: of the split, as it was published: counts and checksums of its parquet files are in it.
        read_file: the name of a file -> its content.
        pair_seed: of the pairing of A and A', within a shard where this has two documents; None for rows without A'.
        window: shards whose rows are mixed, and which are held in memory together. As many again are loaded ahead.

    Raises:
        ValueError: if the provenance names no parquet files.
    """

    def __init__(
        self,
        provenance: dict[str, Any],
        read_file: Callable[[str], bytes],
        pair_seed: int | None = None,
        window: int = 8,
    ) -> None:
        if not provenance.get("parquet"):
            raise ValueError("activations: the stream has no parquet files; publish it with: consistency-lens push")
        self.provenance = provenance
        self.read_file = read_file
        self.pair_seed = pair_seed
        self.window = window
        self.shard_rows = np.array([file["rows"] for file in provenance["parquet"]], dtype=np.int64)
        self.first_rows = np.cumsum(self.shard_rows) - self.shard_rows
        self._shards: dict[int, Future[Shard]] = {}
        # shard -> those that are in memory while it is in use
        self._together: dict[int, list[int]] = {}
        self._kept: list[int] = []

    def __len__(self) -> int:
        return int(self.shard_rows.sum())

    @property
    def mean(self) -> torch.Tensor:
        """Mean activation of the whole split, (d,) float32."""
        return torch.tensor(self.provenance["mean"], dtype=torch.float32)

    @property
    def rms(self) -> float:
        """Root mean square over rows and dimensions of A - mean."""
        return self.provenance["rms"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a batch; waits for the shards that are not here yet.

        Raises:
            ValueError: if a file is not the one that was published, or cannot be had.
        """
        return [self._row(int(index)) for index in indices]

    def take(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Up to `count` random rows of a window of random shards, in memory, in the order of their numbers.

        Of held-out rows those are left out that are known to be training rows over again (`held_out_from`).
        """
        generator = np.random.default_rng([seed, count])
        shards = generator.permutation(np.flatnonzero(self.shard_rows))[: self.window]
        rows = np.concatenate([self.first_rows[shard] + np.arange(self.shard_rows[shard]) for shard in shards])
        rows = np.setdiff1d(rows, self.provenance.get("seen_in_training", []))
        chosen = np.sort(generator.choice(rows, min(count, len(rows)), replace=False))
        return [_copied(row) for row in self.__getitems__(chosen.tolist())]

    def expect(self, windows: Sequence[Sequence[int]]) -> None:
        """Says in which order windows of shards will be asked for: each is loaded while the one before it is used."""
        self._together = {}
        for window, following in zip(windows, [*windows[1:], []], strict=True):
            self._together |= dict.fromkeys(window, [*window, *following])

    def close(self) -> None:
        """Drops all shards, and the loads that have not begun; what is asked for later is loaded anew."""
        self._together = {}
        self._keep([])
        self._loader.shutdown(wait=False, cancel_futures=True)
        del self._loader

    def _row(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        shard, place = self._shard(number), index - int(self.first_rows[number])
        row = {
            "activation": shard.activations[place],
            "input_ids": shard.contexts[place],
            "position": len(shard.contexts[place]) - 1,
            "document": shard.documents[place],
            "row": index,
        }
        if shard.others is not None and shard.partners is not None:
            row["other_activation"] = shard.others[shard.partners[place]]
        return row

    def _shard(self, number: int) -> Shard:
        # without an order, those that were asked for last
        latest = [*(n for n in self._shards if n != number), number]
        together = self._together.get(number) or latest[-2 * self.window :]
        if together is not self._kept:
            self._keep(together)
        for other in (number, *together):
            if other not in self._shards:
                self._shards[other] = self._loader.submit(self._load, other)
        try:
            return self._shards[number].result()
        except Exception:
            del self._shards[number]  # the next time it is tried anew
            raise

    def _keep(self, shards: list[int]) -> None:
        """Drops all others."""
        self._kept = shards
        for number in self._shards.keys() - set(shards):
            self._shards.pop(number).cancel()

    @cached_property
    def _loader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(LOADING_THREADS, "shards")

    def _load(self, number: int) -> Shard:
        shard = self._read(number)
        if self.pair_seed is None:
            return shard
        documents, others, following = shard.documents, shard.activations, number
        while (documents == documents[0]).all():
            following = (following + 1) % len(self.shard_rows)
            if following == number:
                break  # pair_documents says what is wrong
            beside = self._read(following)
            documents = np.concatenate([documents, beside.documents])
            others = np.concatenate([others, beside.activations])
        partners = pair_documents(documents, self.pair_seed + number)[: len(shard.documents)]
        return Shard(shard.activations, shard.contexts, shard.documents, others, partners)

    def _read(self, number: int) -> Shard:
        file = self.provenance["parquet"][number]
        content = self.read_file(file["file"])
        if sha256(content).hexdigest() != file["sha256"]:
            raise ValueError(
                f"activations: the sha256 of {file['file']!r} is not {file['sha256']}, as published; try again, or "
                "have it published anew"
            )
        table = pq.read_table(io.BytesIO(content), columns=COLUMNS)
        return Shard(activation_matrix(table), token_lists(table), table["document"].to_numpy())


def _copied(row: dict[str, Any]) -> dict[str, Any]:
    """A row that does not hold its whole shard in memory."""
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def open_stream(
    repo: str, split: str, revision: str | None = None, pair_seed: int | None = None, window: int = 8
) -> StreamedActivations:
    """A split of a cache on the Hub, at the commit that `revision` is at now.

    Args:
        repo: Hub id of the dataset.
        pair_seed, window: see `StreamedActivations`.

    Raises:
        ValueError: if there is no such dataset, split or revision, or it was not made by `consistency-lens push`.
        HubError: if the Hub cannot be reached, or fails.
    """
    if Path(repo).exists() or repo.count("/") != 1:
        raise ValueError(
            f"activations: no cache at {repo!r}; pass the folder of one, the Hub id of a published one "
            "(name/repository), cache or on_the_fly"
        )
    try:
        with asking_hub(repo, revision):
            commit = HfApi().dataset_info(repo, revision=revision).sha or "main"
    except (ValueError, HubError) as error:
        raise type(error)(f"activations: there is no folder {repo!r} here; {error}") from error
    provenance = published_provenance(repo, split, commit) | {"streamed_from": {"repo": repo, "commit": commit}}

    def read_file(name: str) -> bytes:
        with TemporaryDirectory() as folder, asking_hub(repo, commit):
            file = HfApi().hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_dir=folder)
            return Path(file).read_bytes()

    return StreamedActivations(provenance, patiently(read_file), pair_seed, window)


def patiently(read_file: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Reads files with further tries where the Hub fails: a run of days should not end with one request."""

    def read(name: str) -> bytes:
        for seconds in RETRY_SECONDS:
            try:
                return read_file(name)
            except HubError as error:
                logger.warning("%s; trying %s again in %d seconds", error, name, seconds)
                time.sleep(seconds)
        return read_file(name)

    return read


class StreamSampler(torch.utils.data.Sampler[int]):
    """The order of a pass over a stream: shards in random order, the rows of a window of them mixed.

    Each process gets the rows of shards of its own, but for a rest at the end that makes the counts even. The order
    follows from the seed and the epoch, and is the same in every process.

    Args:
        stream: what is read.
        seed: of the order.
        batch_size: rows that a process takes at a time.
        num_processes, process_index: of the training.
    """

    def __init__(
        self, stream: StreamedActivations, seed: int, batch_size: int, num_processes: int = 1, process_index: int = 0
    ) -> None:
        self.stream = stream
        self.seed = seed
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """Another order in every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order, windows = self.order()
        self.stream.expect(windows[self.process_index])
        return iter(order.tolist())

    def order(self) -> tuple[np.ndarray, list[list[list[int]]]]:
        """The rows (N,) in order, batches of the processes in turn; and the windows of each process, in order."""
        stream, generator = self.stream, np.random.default_rng([self.seed, self.epoch])
        permuted = generator.permutation(np.flatnonzero(stream.shard_rows)).tolist()
        shards = [permuted[process :: self.num_processes] for process in range(self.num_processes)]
        windows = [[own[i : i + stream.window] for i in range(0, len(own), stream.window)] for own in shards]
        rows = [self._mixed(own, generator) for own in windows]
        batches = min(map(len, rows)) // self.batch_size
        even = batches * self.batch_size
        in_turn = np.stack([own[:even].reshape(batches, self.batch_size) for own in rows], axis=1).reshape(-1)
        return np.concatenate([in_turn, *(own[even:] for own in rows)]), windows

    def _mixed(self, windows: list[list[int]], generator: np.random.Generator) -> np.ndarray:
        """The rows of windows of shards, one after the other, each mixed."""
        stream, parts = self.stream, [np.empty(0, dtype=np.int64)]
        for window in windows:
            rows = [stream.first_rows[shard] + np.arange(stream.shard_rows[shard]) for shard in window]
            parts.append(generator.permutation(np.concatenate(rows)))
        return np.concatenate(parts)
