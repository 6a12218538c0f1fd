"""Publishing activation caches as a data set on the Hub: parquet, provenance, and a card rendered from both.

The parquet files are staged in `.<name>.push` beside what is pushed, by one push at a time. One that was killed or has
failed goes on there; a finished one removes it. What is staged depends on the cache alone, so a second push of the
same cache changes nothing.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..atomic_write import write_json
from ..data.activation_cache import BUILDING_FILE, ActivationCache
from ..data.cache_columns import cache_features
from ..data.cache_description import describe_cache, load_cache_tokenizer
from ..data.cache_folder import how_to_finish, writing
from ..data.cache_parquet import write_parquet
from ..data.cache_verification import is_cache, verify_cache
from ..hub_connection import asking_hub
from ..hub_upload import check_no_token
from ..public_names import is_path, public_name
from .artifact_checks import raise_if_failed
from .cache_card import write_cache_card
from .card_metadata import check_card_metadata

logger = logging.getLogger(__name__)

FORMAT = 1
SETTINGS_FILE = "staged.json"
DATA, PROVENANCE = "data", "provenance"
TRAIN, VALIDATION = "train", "validation"
SEEN_IN_TRAINING = "seen_in_training"
# The splits of one data set must agree in these.
SHARED = ("weights_hash", "tokenizer_hash", "layer", "width", "dtype")
# of a provenance, those that may be a Hub id or a path
NAMES = ("subject", "tokenizer", "dataset")
# of a repository, what a push replaces
OWN_FILES = [f"{DATA}/*.parquet", f"{PROVENANCE}/*.json"]


class PushedCache(NamedTuple):
    """What a push has done."""

    url: str
    commit: str | None
    """None for a dry run."""
    rows: dict[str, int]
    """Of each split."""
    folder: Path | None
    """Where a dry run left what it would upload."""


def push_cache(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    language: Sequence[str] = (),
    revision: str | None = None,
    text: bool = True,
    dry_run: bool = False,
    progress: bool = True,
) -> PushedCache:
    """Publishes a cache, or the caches of the splits in a folder, as a data set.

    Args:
        path: folder of a cache, or of `train` and `validation` caches of one layer.
        repo: id of the data set; made if it is not there.
        private: whether only its owner may see it.
        license, language: for the card, as the Hub names them.
        revision: branch; made if it is not there.
        text: whether the decoded contexts stand beside the tokens; left out where the tokenizer cannot be loaded.
        dry_run: do all but the upload.

    Raises:
        ValueError: for a user's mistake, such as a path without a cache, splits of different subjects or with
            documents in common, another push of it at work, a repository that holds something else or a split that
            this push would drop, a token that does not do, or a licence or language that the Hub does not know.
        VerificationError: if a cache does not pass `verify_cache`.
        HubError: if the Hub cannot be reached, or fails.
        CacheWriteError: if the staged files cannot be written.
    """
    check_card_metadata(license, language)
    path = Path(path).resolve()
    caches = {split: ActivationCache.open(folder) for split, folder in splits_of(path).items()}
    _check_agreement(caches)
    if not dry_run:
        _check_remote(repo, revision, caches, private)
    for split, cache in caches.items():
        raise_if_failed(verify_cache(cache.path, progress=progress), f"cache: {split} at {str(cache.path)!r}")
    seen = seen_in_training(caches)
    if not dry_run:
        _make_repository(repo, revision, private)  # first, for it may not be allowed
    tokenizer = load_cache_tokenizer(next(iter(caches.values())).provenance) if text else None
    if text and tokenizer is None:
        logger.warning("the tokenizer of the cache is not to be had: the decoded contexts are left out")
    rows = {split: len(cache) for split, cache in caches.items()}
    url = f"{HfApi().endpoint}/datasets/{repo}"
    place = path.with_name(f".{path.name}.push")
    with _only_push(place):
        folder = stage(caches, place, tokenizer, seen, progress)
        descriptions = {split: describe_cache(cache, tokenizer, progress=progress) for split, cache in caches.items()}
        files = {split: folder / PROVENANCE / f"{split}.json" for split in caches}
        published = {split: json.loads(file.read_text(encoding="utf-8")) for split, file in files.items()}
        records = {split: _records(place, split) for split in caches}
        features = _features(caches, tokenizer)
        write_cache_card(folder, repo, published, descriptions, records, features, license, list(language))
        check_no_token(folder)
        if dry_run:
            return PushedCache(url, None, rows, folder)
        commit = _upload(folder, repo, revision, f"Activation cache, {sum(rows.values()):,} rows")
        shutil.rmtree(place, ignore_errors=True)
    return PushedCache(url, commit, rows, None)


def splits_of(path: Path) -> dict[str, Path]:
    """Split -> folder of its cache, `train` first.

    Raises:
        ValueError: if there is no cache, one is unfinished, two are of one split, or a split's name cannot be used.
    """
    if not path.is_dir():
        raise ValueError(f"path: no folder at {str(path)!r}; pass the folder of an activation cache")
    folders = [path] if is_cache(path) else sorted(child for child in path.iterdir() if is_cache(child))
    unfinished = [child for child in (path, *path.iterdir()) if (child / BUILDING_FILE).is_file()]
    unfinished = [child for child in unfinished if not is_cache(child)]
    if unfinished:
        raise ValueError(f"path: the cache at {str(unfinished[0])!r} is unfinished: {how_to_finish(unfinished[0])}")
    if not folders:
        raise ValueError(f"path: no activation cache at {str(path)!r} or just below it; pass one")
    found: dict[str, Path] = {}
    for folder in folders:
        split = ActivationCache.open(folder).provenance["dataset_split"] or "train"
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise ValueError(f"path: the Hub takes no split of the name {split!r} ({folder}); build it under another")
        if split in found:
            raise ValueError(f"path: {found[split].name!r} and {folder.name!r} are both of split {split!r}; push one")
        found[split] = folder
    return dict(sorted(found.items(), key=lambda item: (item[0] != "train", item[0])))


def _check_agreement(caches: Mapping[str, ActivationCache]) -> None:
    (first, one), *others = caches.items()
    for split, other in others:
        for key in SHARED:
            if one.provenance[key] != other.provenance[key]:
                raise ValueError(
                    f"path: {first!r} and {split!r} are no splits of one cache: {key} is {one.provenance[key]!r} and "
                    f"{other.provenance[key]!r}; push them one by one"
                )


def _check_remote(repo: str, revision: str | None, caches: Mapping[str, ActivationCache], private: bool) -> None:
    """Checks that the token does, and that nothing on the Hub would be lost or shown."""
    api = HfApi()
    with asking_hub(repo, revision):
        api.whoami()
        try:
            info = api.dataset_info(repo, revision=revision)
        except RepositoryNotFoundError:
            return
        except RevisionNotFoundError:
            info = api.dataset_info(repo)
    if private and not info.private:
        raise ValueError(f"private: {repo!r} is there and public; make it private on the Hub, or push to another")
    files = [sibling.rfilename for sibling in info.siblings or []]
    splits = {Path(file).stem for file in files if Path(file).match(OWN_FILES[1])}
    if not splits and any(file.endswith((".parquet", ".arrow", ".csv", ".json", ".jsonl")) for file in files):
        raise ValueError(f"repo: {repo!r} holds a data set that is no activation cache; choose another name")
    dropped = sorted(splits - caches.keys())
    if dropped:
        raise ValueError(
            f"path: {repo!r} has the split {dropped[0]!r} too, which this push would drop; push a folder with caches "
            "of all its splits, or choose another name"
        )


def seen_in_training(caches: Mapping[str, ActivationCache]) -> list[int] | None:
    """The validation rows that say nothing about text that is new to a lens: see `ActivationSource.held_out_from`.

    Args:
        caches: of each split that is published.

    Returns:
        Their row numbers, ascending; None where `train` and `validation` do not go together.

    Raises:
        ValueError: if the two share documents, or too little is left of the validation rows.
    """
    if TRAIN not in caches or VALIDATION not in caches:
        return None
    train, validation = caches[TRAIN], caches[VALIDATION]
    shared = np.intersect1d(train.documents, validation.documents)
    if len(shared):
        raise ValueError(
            f"path: {TRAIN!r} and {VALIDATION!r} share {len(shared):,} documents, so nothing would be held out; split "
            "by document, or push them one by one"
        )
    unseen = validation.held_out_from(train)
    return np.setdiff1d(validation.rows, unseen.rows).tolist()


# Staging


@contextmanager
def _only_push(place: Path) -> Iterator[None]:
    """Keeps other pushes out of a staging folder; the system ends the lock of one that is killed."""
    with writing(place):
        try:
            lock = FileLock(place.with_name(f"{place.name}.lock")).acquire(blocking=False)
        except Timeout as error:
            raise ValueError(f"path: another push is at work in {str(place)!r}; wait for it") from error
    with lock:
        yield


def stage(
    caches: Mapping[str, ActivationCache],
    staging: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    seen: Sequence[int] | None,
    progress: bool = True,
) -> Path:
    """Writes the parquet files and the provenance of each split, going on where an earlier call was killed.

    Args:
        staging: folder for it, made or, if it belongs to other caches, made anew.
        tokenizer: decodes the contexts; None: no text.
        seen: for the provenance of the validation split, see `seen_in_training`.

    Returns:
        The folder that is uploaded.
    """
    features = _features(caches, tokenizer)
    hashes = {split: [shard["sha256"] for shard in cache.provenance["shards"]] for split, cache in caches.items()}
    settings = {"format": FORMAT, "shards": hashes, "columns": list(features)}
    with writing(staging):
        _claim(staging, settings)
        for split, cache in caches.items():
            shards = cache.provenance["shards"]
            bar = tqdm(shards, desc=f"writing parquet, {split}", unit=" shards", disable=not progress)
            for index, shard in enumerate(bar):
                name = f"{split}-{index:05d}-of-{len(shards):05d}"
                record_file = staging / "records" / f"{name}.json"
                if not record_file.is_file():
                    target = staging / "upload" / DATA / f"{name}.parquet"
                    write_json(record_file, write_parquet(cache.path / shard["file"], target, features, tokenizer))
            records = [
                {"file": f"{DATA}/{record['file']}", **{key: record[key] for key in ("rows", "bytes", "sha256")}}
                for record in _records(staging, split)
            ]
            provenance = redacted_provenance(cache.provenance) | {"parquet": records}
            if split == VALIDATION and seen is not None:
                provenance[SEEN_IN_TRAINING] = seen
            write_json(staging / "upload" / PROVENANCE / f"{split}.json", provenance)
    return staging / "upload"


def _features(caches: Mapping[str, ActivationCache], tokenizer: PreTrainedTokenizerBase | None) -> Any:
    provenance = next(iter(caches.values())).provenance
    return cache_features(provenance["width"], provenance["dtype"], with_text=tokenizer is not None)


def _claim(staging: Path, settings: dict[str, Any]) -> None:
    """Makes the folder that of these settings, empty unless it was so before."""
    file = staging / SETTINGS_FILE
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != settings:
        if staging.exists():
            shutil.rmtree(staging)
        write_json(file, settings)


def _records(staging: Path, split: str) -> list[dict[str, Any]]:
    files = sorted((staging / "records").glob(f"{split}-*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def redacted_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance as others may read it: of local files and folders the name alone, and not where it was pulled.

    `local` lists the keys whose names are of such: nobody should look for them on the Hub.
    """
    names = {key: provenance[key] for key in NAMES if provenance.get(key)}
    local = [key for key, name in names.items() if is_path(name) or key in provenance.get("local", ())]
    kept = {key: value for key, value in provenance.items() if key != "pulled_from"}
    return kept | {key: public_name(name) for key, name in names.items()} | {"local": local}


# Upload


def _make_repository(repo: str, revision: str | None, private: bool) -> None:
    """Makes the repository and its branch, if they are not there."""
    api = HfApi()
    with asking_hub(repo, revision):
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, repo_type="dataset", branch=revision, exist_ok=True)


def _upload(folder: Path, repo: str, revision: str | None, message: str) -> str:
    """Uploads what is new in one commit, as far as the Hub takes it in one; returns the commit that holds all."""
    with asking_hub(repo, revision):
        # what an earlier cache with more shards left is deleted
        pushed = HfApi().upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=["*.partial"],
            delete_patterns=list(OWN_FILES),
        )
        return pushed.oid
