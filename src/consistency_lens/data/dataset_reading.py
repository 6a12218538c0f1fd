"""Data sets from anywhere: a file, a folder, or the Hub, as one split with the column that is asked for."""

import difflib
import errno
import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi

from .corpus import iterate_documents

# suffix of a file -> the loader of `datasets` that reads it
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEXT_FEATURES = Features({"text": Value("string")})


def read_dataset(
    source: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    *,
    cache_dir: Path,
) -> Dataset:
    """One split of a data set.

    Args:
        source: a JSON, JSONL, CSV or parquet file, any other file with documents divided by `<|endoftext|>` (column
            `text`), a folder of such data or of `save_to_disk`, or the id of a data set on the Hub.
        config: name of the configuration, where there are several.
        split: such as `train`, or a part of one, such as `train[:10%]`.
        revision: of a data set on the Hub.
        cache_dir: an empty folder for what local files are converted to; it must stay while the result is in use. A
            data set of the Hub is kept where `datasets` keeps it.

    Raises:
        ValueError: if it cannot be read, has no such split, or the split is empty, or it is local and has no such
            thing as the revision or the configuration.
        OSError: if there is no room for what it is converted to.
    """
    check_source(source, config, revision)
    path = Path(source)
    cache = str(cache_dir)
    try:
        if path.is_file() and path.suffix in LOADERS:
            dataset = load_dataset(LOADERS[path.suffix], data_files=str(path), split=split, cache_dir=cache)
        elif path.is_file():
            dataset = _read_text_file(path, split, cache)
        elif _is_saved(path):
            dataset = _saved_split(load_from_disk(path), split)
        elif path.is_dir():
            dataset = load_dataset(str(path), name=config, split=split, cache_dir=cache)
        else:
            dataset = load_dataset(source, name=config, split=split, revision=revision)
    except Exception as error:  # every loader raises its own kinds
        _raise_if_full(error)
        raise ValueError(
            f"dataset: cannot read {source!r}, split {split!r}, or it is empty; pass a file, a folder or a data set "
            f"on the Hub ({cause_of(error)})"
        ) from error
    if len(dataset) == 0:
        raise ValueError(f"dataset: split {split!r} of {source!r} is empty; pass another split")
    return dataset


def stream_dataset(
    source: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> Dataset | IterableDataset:
    """One split of a data set, read as it is gone through: nothing is converted, and of the Hub's no file is kept.

    Args:
        source, config, split, revision: as of `read_dataset`, but for parts of a split, which cannot be streamed.

    Raises:
        ValueError: as `read_dataset`, but a data set that is empty or damaged shows when it is gone through.
    """
    check_source(source, config, revision)
    path = Path(source)
    try:
        if path.is_file() and path.suffix in LOADERS:
            return load_dataset(LOADERS[path.suffix], data_files=str(path), split=split, streaming=True)
        if path.is_file():
            _check_split(split, ["train"])
            return IterableDataset.from_generator(_text_rows, features=TEXT_FEATURES, gen_kwargs={"path": str(path)})
        if _is_saved(path):
            return _saved_split(load_from_disk(path), split)
        return load_dataset(source, name=config, split=split, revision=revision, streaming=True)
    except Exception as error:  # every loader raises its own kinds
        raise ValueError(
            f"dataset: cannot read {source!r}, split {split!r}; pass a file, a folder or a data set on the Hub "
            f"({cause_of(error)})"
        ) from error


def check_source(source: str, config: str | None, revision: str | None, argument: str = "dataset") -> None:
    """Raises a ValueError for a revision of what is not on the Hub, or a configuration of what has none."""
    path = Path(source)
    if revision is not None and path.exists():
        raise ValueError(
            f"{argument}: got the revision {revision!r}, but {source!r} is local and has none; leave it out"
        )
    if config is not None and (path.is_file() or _is_saved(path)):
        raise ValueError(
            f"{argument}: got the configuration {config!r}, but {source!r} is local and has none; leave it out"
        )


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _raise_if_full(error: BaseException | None) -> None:
    """Raises the system's own error if there was no room to write, whatever a loader made of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise error
        error = error.__cause__ or error.__context__


def _read_text_file(path: Path, split: str, cache_dir: str) -> Dataset:
    _check_split(split, ["train"])
    if next(iterate_documents(path), None) is None:
        raise ValueError("no documents")
    return Dataset.from_generator(
        _text_rows, features=TEXT_FEATURES, cache_dir=cache_dir, gen_kwargs={"path": str(path)}
    )


def _text_rows(path: str) -> Iterator[dict[str, str]]:
    for document in iterate_documents(path):
        yield {"text": document}


def _saved_split(saved: Dataset | DatasetDict, split: str) -> Dataset:
    """The split of what `save_to_disk` wrote; a single data set counts as `train` where it has no name of its own."""
    parts = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    _check_split(split, parts)
    return parts[split].with_format(None)  # a saved format would make arrays of the rows


def _check_split(split: str, known: Collection[str]) -> None:
    if split not in known:
        raise ValueError(f"it has {', '.join(known)}")


def check_column(dataset: Dataset, column: str, argument: str) -> None:
    """Raises a ValueError, with the nearest name, if a data set lacks a column."""
    check_name(column, dataset.column_names, argument)


def check_name(column: str, columns: Sequence[str], argument: str) -> None:
    """Raises a ValueError, with the nearest name, if a column is not one of these."""
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "pass one of them"
        raise ValueError(f"{argument}: no column {column!r}, the data set has {', '.join(columns)}; {hint}")


def local_hash(source: str) -> str | None:
    """Sha256 of a local file's suffix (it says how the file is read) and content, or of the names and contents of a
    folder's files; None for a data set on the Hub.
    """
    path = Path(source)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = path.suffix if file == path else file.relative_to(path).as_posix()
        digest.update(name.encode() + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit that a data set on the Hub is at; None where the Hub cannot be asked, or the data set is local."""
    if Path(source).exists():
        return None
    try:
        return HfApi().dataset_info(source, revision=revision).sha
    except Exception:  # of many kinds; reading the data set says what is wrong, or finds it in the cache
        return None


def cause_of(error: Exception) -> str:
    """The first line of what went wrong while a data set was read."""
    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
