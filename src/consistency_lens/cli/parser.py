"""Arguments from flags and a YAML file: dataclasses, flags on top of the file, unknown keys are errors."""

import argparse
import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import PROGRAM, all_commands
from .config_values import config_values

if TYPE_CHECKING:
    from transformers import HfArgumentParser

# What a recipe says to the other commands of its pipeline, each under the command's name.
RECIPE_SECTIONS = ("submit", "tokenize", "cache", "eval")


def parse_arguments(
    dataclasses: Sequence[Any],
    argv: Sequence[str] | None = None,
    command: str | None = None,
    sections: Collection[str] = (),
    first: str | None = None,
) -> tuple:
    """Reads `--config file.yaml` and flags into dataclasses; a flag wins over the file.

    Args:
        command: what is typed after `consistency-lens`, for its help; see `commands`.
        sections: keys of the file that are for other commands, and are not read here.
        first: the argument that may be given without its flag, before all others.

    Raises:
        ValueError: for an unknown flag or key in the file (with the nearest known one), a value of another kind, or a
            file that is not there.
    """
    config, rest = split_config(argv)
    if first is not None and rest and not rest[0].startswith("-"):
        rest = [f"--{first}={rest[0]}", *rest[1:]]
    parser = make_parser(dataclasses, command, first)
    if config is not None:
        parser.set_defaults(**read_config(config, dataclasses, sections))
    # before any dataclass is made, whose checks would speak first
    unknown = parse_known(parser, rest)[1]
    if unknown:
        raise ValueError(unknown_flag(unknown, known_names(dataclasses)))
    # what follows the dataclasses is a namespace with --config in it
    return parser.parse_args_into_dataclasses(rest, look_for_args_file=False)[: len(dataclasses)]


def parse_given(
    dataclasses: Sequence[Any], argv: Sequence[str], config: Mapping[str, Any], command: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What is said for dataclasses, without making them: some look for the devices of the machine they are made on.

    Args:
        argv: flags, which win.
        config: what a file says; see `check_keys`.
        command: whose help is told; see `parse_arguments`.

    Returns:
        name -> value, read as its kind, of every argument that is given; and the flags of no argument.

    Raises:
        ValueError: for a value of another kind.
    """
    parser = make_parser(dataclasses, command)
    parser.set_defaults(**config_values(config, dataclasses))
    # the parser's own defaults stay what --help tells
    values, rest = parse_known(parser, argv, dict.fromkeys(known_names(dataclasses) - set(config), MISSING))
    return {name: value for name, value in vars(values).items() if value is not MISSING and name != "config"}, rest


def split_config(argv: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """The file of `--config`, if there is one, and the other flags."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", const="")
    found, rest = finder.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    return None if found.config is None else Path(found.config), rest


def make_parser(
    dataclasses: Sequence[Any], command: str | None = None, first: str | None = None
) -> "HfArgumentParser":
    """A parser of the dataclasses' flags and `--config`, whose help says what the command does, with an example."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(dataclasses, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", help="YAML file with any of these arguments; flags win over it")
    if command is not None:
        about, program = all_commands()[command], f"{PROGRAM} {command}"
        words = "" if first is None else f" [{first.upper()}]"
        parser.prog, parser.usage = program, f"{program}{words} [--config FILE] [--FLAG VALUE ...]"
        parser.description = f"{about.summary[0].upper()}{about.summary[1:]}."
        parser.epilog = f"Example: {program} {about.example}".rstrip()
    return parser


def parse_known(
    parser: argparse.ArgumentParser, argv: Sequence[str], values: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The values of known flags, and the parts of the line that belong to none.

    Args:
        values: of arguments that are not given; the parser's defaults for those that are not in it.

    Raises:
        ValueError: for a value of another kind.
    """
    try:
        return parser.parse_known_args(argv, argparse.Namespace(**(values or {})))
    except argparse.ArgumentError as error:
        flag = (error.argument_name or "flags").partition("/")[0]  # every flag has a spelling with hyphens too
        raise ValueError(f"{flag}: {error.message.rstrip('.')}; see --help") from error


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


def read_config(path: Path, dataclasses: Sequence[Any], sections: Collection[str] = ()) -> dict[str, Any]:
    """The keys of a YAML recipe but its sections, each checked against the dataclasses' fields."""
    config = {key: value for key, value in read_yaml(path).items() if key not in sections}
    check_keys(f"{str(path)!r}", config, known_names(dataclasses))
    return config_values(config, dataclasses)


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML recipe holds.

    Raises:
        ValueError: if it is not there, no YAML, no mapping, or says the same twice.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"--config: no file at {str(path)!r}; pass the path of a YAML recipe")
    try:
        text = path.read_text(encoding="utf-8")
        config, root = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"--config: {str(path)!r} is no YAML: {cause}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config: {str(path)!r} must hold 'key: value' lines, got {type(config).__name__}")
    doubled = doubled_keys(root)
    if doubled:  # YAML would take the last one without a word
        raise ValueError(f"--config: {str(path)!r} has the key {doubled[0]!r} twice; remove one")
    return config


def doubled_keys(root: Any) -> list[str]:
    """The keys that stand twice in a YAML mapping, or in one of its sections."""
    parts = [] if root is None else [root, *(value for _, value in root.value)]
    mappings = [[key.value for key, _ in part.value] for part in parts if part.id == "mapping"]
    return [key for keys in mappings for number, key in enumerate(keys) if key in keys[:number]]


def check_keys(place: str, config: Mapping[str, Any], known: Collection[str]) -> None:
    """ValueError for a key that is no argument, with the nearest one; `place` is where it stands."""
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
            raise ValueError(f"--config: {place} has the unknown key {key!r}{hint}")
