"""Checks of a lens's folder: by itself, against its index, and against its base model; and where lenses lie."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from ..artifact_subject import subject_location
from ..data.cache_against_subject import made_as
from ..data.cache_check import Check
from ..data.subject_loading import LoadedSubject, load_subject_and_tokenizer
from ..hub_connection import first_line
from ..lens_artifact import CONFIG_FILE, WEIGHTS_FILE
from ..modeling_consistency_lens import ConsistencyLensModel, LensDecoder, LensEncoder
from .artifact_checks import checksums_check, files_check, made_check, subject_checks, weights_check
from .index import INDEX_FILE, LARGEST_INDEX
from .lens_folder import CONFIGS, LensFolder, read_lens_folder
from .lens_index import LensEntry, read_lens_index

MODELS: dict[str, type[Any]] = {
    of.config_class.model_type: of for of in (ConsistencyLensModel, LensDecoder, LensEncoder)
}
WEIGHTS_INDEX = "model.safetensors.index.json"


def model_type(folder: Path) -> str | None:
    """What kind of model the configuration in a folder is of; None if there is none that says it."""
    try:
        config: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def is_lens(folder: Path) -> bool:
    """Whether the configuration in a folder is that of a lens, a decoder or an encoder."""
    return model_type(folder) in CONFIGS


def find_lenses(path: str | Path) -> list[Path]:
    """The folders of the lenses at `path` or below it, hidden ones and checkpoints inside a lens's folder aside."""
    path = Path(path)
    if is_lens(path):
        return [path]
    return sorted(_below(path)) if path.is_dir() else []


def _below(path: Path) -> Iterator[Path]:
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink() and not child.name.startswith((".", "checkpoint-")):
            yield from [child] if is_lens(child) else _below(child)


def content_checks(path: Path) -> list[Check]:
    """Checks a folder by itself: `files`, `configuration`, `code`, `weights`, `provenance`."""
    try:
        lens = read_lens_folder(path)
    except Exception as error:  # whatever a configuration of others makes the classes raise
        return [files_check(path, below=False), Check("configuration", False, f"cannot be read ({first_line(error)})")]
    clone = lens.clone
    told = f"{lens.config.model_type} of layer {clone.layer}, T = {clone.num_text_tokens}"
    problems = [] if clone.base_model_name_or_path else ["names no base model"]
    return [
        files_check(path, below=False),
        made_check("configuration", problems, told),
        _code_check(path),
        weights_check(path),
        _provenance_check(lens),
    ]


def _code_check(path: Path) -> Check:
    """Whether all code that a configuration names lies beside it; none of it is run here."""
    named, problems = set(), []
    for file in (CONFIG_FILE, "tokenizer_config.json"):
        try:
            places = list(_code_places(json.loads((path / file).read_text(encoding="utf-8"))))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{file}: no JSON ({first_line(error)})")
            continue
        for place in places:
            if "--" in place:
                problems.append(f"{file} names code of another repository ({place}); remove it")
            else:
                named.add(f"{place.partition('.')[0]}.py")
    problems += [f"{name}: missing" for name in sorted(named) if not (path / name).is_file()]
    count = len(list(path.glob("*.py")))
    code = f"{count} files, run with trust_remote_code=True alone: read them first" if count else "none"
    return made_check("code", problems, code)


def _code_places(config: Any) -> Iterator[str]:
    """What `auto_map` and `custom_pipelines` name, wherever they stand in a configuration."""
    if isinstance(config, list):
        for item in config:
            yield from _code_places(item)
    elif isinstance(config, dict):
        for key, value in config.items():
            yield from _texts(value) if key in ("auto_map", "custom_pipelines") else _code_places(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _provenance_check(lens: LensFolder) -> Check:
    """Whether the base model is pinned: by its commit, and by the hash of its weights."""
    recorded = lens.data.get("weights_hash")
    if not isinstance(recorded, str):
        return Check("provenance", False, "no hash of the base model's weights is recorded", checked=False)
    return Check("provenance", True, f"{lens.base} at {lens.base_revision or 'no commit: a local folder'}")


def entry_of(path: Path) -> LensEntry | None:
    """What an index beside a lens's folder, or in it, says of the lens; None where there is none.

    Raises:
        ValueError: if the index cannot be read.
    """
    path = path.resolve()
    for folder, place in ((path, ""), (path.parent, path.name)):
        file = folder / INDEX_FILE
        if not file.is_file() or file.stat().st_size > LARGEST_INDEX:
            continue
        content = file.read_bytes()
        # a tree of tuned lenses has an index of its own kind
        if place and b"consistency-lens/" not in content:
            continue
        for entry in read_lens_index(content, str(folder)).values():
            if entry.path == place:
                return entry
    return None


def index_checks(path: Path, entry: LensEntry) -> list[Check]:
    """Checks a folder against what an index says: each file, and that configuration and index tell of one lens."""
    hashes = {name: record.sha256 for name, record in entry.files.items()}
    checks = [checksums_check(path, hashes, f"sha256 of {len(hashes)} files, as {INDEX_FILE} has them")]
    besides = {file.name for file in path.iterdir() if file.is_file() and not file.name.startswith(".")} - {INDEX_FILE}
    unknown = sorted(besides - hashes.keys())
    checks.append(made_check("besides", [f"{name}: not in {INDEX_FILE}" for name in unknown], "no other files"))
    try:
        lens = read_lens_folder(path)
    except Exception as error:
        return [*checks, Check("index", False, f"the configuration cannot be read ({first_line(error)})")]
    base, clone = entry.base_model, lens.clone
    pairs = {
        "kind": (lens.config.model_type, entry.kind),
        "base model": (clone.base_model_name_or_path, base.name),
        "revision": (clone.base_model_revision, base.revision),
        "weights_hash": (lens.data.get("weights_hash"), base.weights_hash),
        "layer": (clone.layer, entry.layer),
        "T": (clone.num_text_tokens, entry.num_text_tokens),
    }
    problems = [
        f"{name}: {one!r} here, {other!r} in {INDEX_FILE}" for name, (one, other) in pairs.items() if one != other
    ]
    return [
        *checks,
        made_check("index", problems, f"release {entry.release}, consistency-lens {entry.package_version}"),
    ]


def base_checks(path: Path, subject: LoadedSubject) -> list[Check]:
    """Checks a lens against its base model: its commit, the hash of its weights, its tokenizer, and that it loads."""
    lens = read_lens_folder(path)
    hashes = (lens.data.get("weights_hash"), lens.data.get("tokenizer_hash"))
    checks = subject_checks(lens.base_revision, *hashes, subject)
    if not all(check.passed for check in checks if check.checked):
        return [*checks, Check("loads", False, "not tried: it is another model", checked=False)]
    try:
        kind = MODELS[lens.config.model_type]
        model: PreTrainedModel = kind.from_pretrained(path, base_model=subject.model, verify_base=False)
    except (ValueError, OSError) as error:
        return [*checks, Check("loads", False, first_line(error))]
    return [*checks, Check("loads", True, f"{type(model).__name__} over that model")]


def load_base(
    path: Path, model: str, revision: str | None = None, dtype: str | None = None, device: str | None = None
) -> LoadedSubject:
    """The base model, loaded as it was when the lens was trained unless it is said.

    Raises:
        ValueError: if it cannot be loaded.
    """
    lens = read_lens_folder(path)
    made = made_as(lens.data)
    if revision is None and model == lens.clone.base_model_name_or_path:
        revision = lens.base_revision
    kind = dtype or made["dtype"] or "float32"
    return load_subject_and_tokenizer(model, revision, kind, made["quantization"], device=device)


def verify_lens(
    path: Path,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> list[Check]:
    """Checks a lens, a decoder or an encoder: its folder, against its index if it has one, against its base model.

    Args:
        path: its folder.
        model, revision, dtype, device: the base model and how it is loaded; by default the one that the lens names, if
            it is on this machine, as it was loaded for the training. Nothing is fetched for that.

    Returns:
        All checks, in order.

    Raises:
        ValueError: if a model that is asked for cannot be loaded, or the index cannot be read.
    """
    checks = content_checks(path)
    entry = entry_of(path)
    if entry is None:
        checks.append(Check("checksums", False, f"no {INDEX_FILE}: it was not published", checked=False))
    else:
        checks += index_checks(path, entry)
    if any(check.name == "configuration" and not check.passed for check in checks):
        return checks
    untold = "not at hand, pass --model to compare them"
    if model is not None:
        return checks + base_checks(path, load_base(path, model, revision, dtype, device))
    place = base_at_hand(path)
    if place is not None:
        try:
            return checks + base_checks(path, load_base(path, str(place), revision, dtype, device))
        except ValueError as error:
            untold = f"what is at hand cannot be loaded ({first_line(error)})"
    return [*checks, Check("model weights", False, untold, checked=False)]


def base_at_hand(path: Path) -> Path | None:
    """A folder here with the base model's safetensors: the one that the lens names, or that of its commit in a cache.

    A folder with pickled weights alone is none: nobody has asked for them to be read.
    """
    config = CONFIGS[json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["model_type"]].from_pretrained(path)
    place = Path(subject_location(config))
    if config.base_model_revision is None:
        has_weights = any((place / file).is_file() for file in (WEIGHTS_FILE, WEIGHTS_INDEX))
        return place if config.base_model_name_or_path and has_weights else None
    for file in (WEIGHTS_FILE, WEIGHTS_INDEX):
        cached = try_to_load_from_cache(config.base_model_name_or_path, file, revision=config.base_model_revision)
        if isinstance(cached, str):
            return Path(cached).parent
    return None
