"""What a run leaves in its folder, read back: nothing of it has to be there, but not all may be missing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# file -> what it would show, and how to get it
FILES = {
    "metrics.json": "the figures: run consistency-lens eval --lens with this folder",
    "samples.jsonl": "sample rows: run consistency-lens eval --lens with this folder",
    "log_history.json": "training curves: training writes them when it ends",
    "run.json": "arguments, time and machine of the training",
    "provenance.json": "subject, data and hashes: training writes them with the lens",
}


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's files, empty where there is no such file.

    Attributes:
        path: the folder.
        metrics, samples, log, run, provenance: the content of the files of `FILES`.
        missing: the files that are not there.
    """

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of the run, as whichever file has them."""
        places = (self.run, self.metrics.get("arguments", {}), self.provenance)
        return next((of["recipe"] for of in places if isinstance(of.get("recipe"), dict)), {})

    @property
    def training(self) -> dict[str, Any]:
        """The arguments of the trainer."""
        places = (self.run, self.metrics.get("arguments", {}))
        return next((of["training"] for of in places if isinstance(of.get("training"), dict)), {})

    @property
    def notes(self) -> list[str]:
        """What the report lacks, for people."""
        return [f"No {name}, which has {FILES[name]}." for name in self.missing]


def read_run(path: str | Path) -> RunFolder:
    """Reads what a run has left.

    Raises:
        ValueError: if there is no such folder, nothing of a run in it, or a file is broken.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"run: no folder at {str(path)!r}; pass the output_dir of a training, e.g. outputs/tiny_stories"
        )
    missing = [name for name in FILES if not (path / name).is_file()]
    if len(missing) == len(FILES):
        raise ValueError(
            f"run: {str(path)!r} has none of {', '.join(FILES)}; pass the output_dir of a training or an evaluation"
        )
    return RunFolder(
        path=path,
        metrics=read_object(path / "metrics.json"),
        samples=read_lines(path / "samples.jsonl"),
        log=read_list(path / "log_history.json"),
        run=read_object(path / "run.json"),
        provenance=read_object(path / "provenance.json"),
        missing=missing,
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    return checked(path, parsed(path, path.read_text(encoding="utf-8")), dict) if path.is_file() else {}


def read_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects; empty if there is no file."""
    rows = checked(path, parsed(path, path.read_text(encoding="utf-8")), list) if path.is_file() else []
    return [checked(path, row, dict) for row in rows]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; empty if there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [checked(path, parsed(path, line), dict) for line in lines if line.strip()]


def parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run: {str(path)!r} is broken ({error}); make it anew, or remove it") from error


@contextmanager
def as_written(file: str, *more: type[Exception]) -> Iterator[None]:
    """Says so where the content of a file is not what this version writes, but that of another, or of a hand.

    Args:
        file: its name, for people.
        more: errors that mean it too, besides those of looking for what is not there.

    Raises:
        ValueError: then.
    """
    kinds: tuple[type[Exception], ...] = (KeyError, TypeError, AttributeError, *more)
    try:
        yield
    except kinds as error:
        cause = f"has no {error} there" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} is not as this version writes it ({cause}); make it anew") from error


def checked(path: Path, content: Any, kind: type) -> Any:
    if not isinstance(content, kind):
        raise ValueError(f"run: {str(path)!r} should hold {kind.__name__}s, got {type(content).__name__}; remove it")
    return content
