"""Fetching activation caches from the Hub: parquet, checked against its provenance, back to the shards of a cache.

A file at a time is downloaded, checked, written as a shard and dropped, so the disk holds the cache and one file. The
provenance is written last, as in a build: a folder that was left half-way is never opened, and the next call goes on.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from tqdm.auto import tqdm

from ..atomic_write import write_json
from ..data.activation_cache import PROVENANCE_FILE
from ..data.cache_check import VerificationError
from ..data.cache_columns import cache_features
from ..data.cache_folder import CacheFolder, writing
from ..data.cache_parquet import published_provenance, read_parquet, write_shard
from ..hub_connection import asking_hub
from .download import DATASET, FileRecord, Snapshot, fetch_checked

PROVENANCE_PATTERN = r"provenance/(?P<split>\w+(\.\w+)*)\.json"
DOWNLOADS = ".downloads"
# of a published provenance, what holds of its parquet files and of the splits that lie beside it there
ONLY_PUBLISHED = ("parquet", "seen_in_training")


class PulledCache(NamedTuple):
    """A cache that is here now."""

    path: Path
    split: str
    rows: int
    commit: str
    is_new: bool
    """False if it was here already."""


def pull_cache(
    repo: str, path: str | Path, *, revision: str | None = None, split: str | None = None, progress: bool = True
) -> list[PulledCache]:
    """Fetches the splits of a published cache; those that are here already are left alone.

    Args:
        repo: id of the data set.
        path: with `split` the folder of the cache, else the folder that gets one for each split, under its name.
        revision: commit, tag or branch.
        split: such as `train`; by default all.

    Raises:
        ValueError: if there is no such repository, revision or split, it holds no cache, or a folder holds another.
        VerificationError: if a file is not what its provenance says; nothing that opens is left.
        HubError: if the Hub cannot be reached, or fails.
        CacheWriteError: if a file cannot be written.
    """
    with asking_hub(repo, revision):
        info = HfApi().dataset_info(repo, revision=revision)
    matches = [re.fullmatch(PROVENANCE_PATTERN, sibling.rfilename) for sibling in info.siblings or []]
    splits = sorted(match["split"] for match in matches if match)
    if not splits or info.sha is None:
        raise ValueError(f"repo: {repo!r} is no activation cache (no provenance/<split>.json); pass one that is")
    if split is not None and split not in splits:
        raise ValueError(f"split: {repo!r} has {', '.join(splits)}, not {split!r}; pass one of them")
    targets = {name: Path(path) / name for name in splits} if split is None else {split: Path(path)}
    return [_Pull(repo, info.sha, name, target, progress).run() for name, target in targets.items()]


class _Pull:
    """The way of one split into its folder."""

    def __init__(self, repo: str, commit: str, split: str, path: Path, progress: bool) -> None:
        self.repo = repo
        self.commit = commit
        self.split = split
        self.path = path
        self.progress = progress

    def run(self) -> PulledCache:
        published = published_provenance(self.repo, self.split, self.commit)
        origin = {"repo": self.repo, "commit": self.commit, "split": self.split}
        folder = CacheFolder(self.path, {"layer": published["layer"], "pulled_from": origin})
        downloads = self.path / DOWNLOADS
        is_new = not folder.is_finished()
        if is_new:
            with folder.locked():
                folder.claim(len(published["parquet"]))
                shards = self._write_shards(folder, published, downloads)
                facts = {key: value for key, value in published.items() if key not in ONLY_PUBLISHED}
                with writing(self.path):
                    write_json(self.path / PROVENANCE_FILE, facts | {"shards": shards, "pulled_from": origin})
        folder.remove_leftovers()
        shutil.rmtree(downloads, ignore_errors=True)
        return PulledCache(self.path, self.split, published["rows"], self.commit, is_new)

    def _write_shards(self, folder: CacheFolder, published: dict[str, Any], downloads: Path) -> list[dict[str, Any]]:
        """Fetches what is missing; returns the records of all shards."""
        features = cache_features(published["width"], published["dtype"])
        bar = tqdm(published["parquet"], desc=f"pulling {self.split}", unit=" shards", disable=not self.progress)
        records = []
        for index, part in enumerate(bar):
            target = self.path / f"shard-{index:05d}.arrow"
            record_file = target.with_suffix(".json")
            if not folder.has_shard(index):
                parquet = self._download(part, downloads)
                try:
                    table = read_parquet(parquet, features)
                except ValueError as error:
                    raise VerificationError(f"cache: {self.repo!r}: {error}") from error
                if len(table) != part["rows"]:
                    raise VerificationError(
                        f"cache: {part['file']} of {self.repo!r} has {len(table):,} rows, not {part['rows']:,}"
                    )
                with writing(self.path):
                    write_json(record_file, write_shard(table, target))
                parquet.unlink()
            records.append(json.loads(record_file.read_text(encoding="utf-8")))
        return records

    def _download(self, part: dict[str, Any], downloads: Path) -> Path:
        """A parquet file, with the checksum that the provenance has for it.

        Raises:
            VerificationError: if it has another.
        """
        record, source = FileRecord(part["sha256"], part["bytes"]), Snapshot(self.repo, self.commit, DATASET)
        return fetch_checked(source, part["file"], record, downloads, "its provenance says")
