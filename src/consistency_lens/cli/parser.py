"""Arguments from flags and a YAML file: dataclasses, flags on top of the file, unknown keys are errors."""

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


def parse_arguments(dataclasses: Sequence[Any], argv: Sequence[str] | None = None, prog: str | None = None) -> tuple:
    """Reads `--config file.yaml` and flags into dataclasses; a flag wins over the file.

    Raises:
        ValueError: for an unknown flag or key in the file (with the nearest known one), a value of another kind, or a
            file that is not there.
    """
    from transformers import HfArgumentParser

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", const="")
    found, rest = finder.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    parser = HfArgumentParser(dataclasses, prog=prog, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", help="YAML file with any of these arguments; flags win over it")
    if found.config is not None:
        parser.set_defaults(**read_config(Path(found.config), dataclasses))
    try:
        # before any dataclass is made, whose checks would speak first
        unknown = parser.parse_known_args(rest)[1]
    except argparse.ArgumentError as error:
        flag = (error.argument_name or "flags").partition("/")[0]  # every flag has a spelling with hyphens too
        raise ValueError(f"{flag}: {error.message.rstrip('.')}; see --help") from error
    if unknown:
        raise ValueError(unknown_flag(unknown, known_names(dataclasses)))
    # what follows the dataclasses is a namespace with --config in it
    return parser.parse_args_into_dataclasses(rest, look_for_args_file=False)[: len(dataclasses)]


def known_names(dataclasses: Sequence[Any]) -> set[str]:
    """The names of all arguments."""
    return {field.name for dataclass in dataclasses for field in fields(dataclass) if field.init}


def unknown_flag(unknown: Sequence[str], known: Collection[str]) -> str:
    """What to say of parts of a command line that belong to no argument."""
    flag = next((part for part in unknown if part.startswith("-")), None)
    if flag is None:
        return f"{unknown[0]!r}: belongs to no flag; put one before it, or quote a value that has spaces"
    name = flag.partition("=")[0]
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    return f"{name}: unknown; {f'did you mean --{near[0]}?' if near else 'see --help'}"


def read_config(path: Path, dataclasses: Sequence[Any]) -> dict[str, Any]:
    """The keys of a YAML recipe, each checked against the dataclasses' fields."""
    import yaml

    if not path.is_file():
        raise ValueError(f"--config: no file at {str(path)!r}; pass the path of a YAML recipe")
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(config, dict):
        raise ValueError(f"--config: {str(path)!r} must hold 'key: value' lines, got {type(config).__name__}")
    known = known_names(dataclasses)
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
            raise ValueError(f"--config: {str(path)!r} has the unknown key {key!r}{hint}")
    return {key: as_flag(value) for key, value in config.items()}


def as_flag(value: Any) -> Any:
    """Numbers as text, so that the flag's own type reads them: YAML takes 1e-3 for a string and 1 for an integer."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
