"""The files of a tuned lens as others may read them: the same content, but no place on the publisher's disk."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..public_names import is_path, public_name, without_paths
from .content_checks import TunedLensFolder
from .index import LOCAL, MODEL_PATTERN

LOCAL_KEY = "local"
MODEL_KEY, DATASET_KEY = "model_id", "dataset.repo_id"


def index_name(provenance: Mapping[str, Any]) -> str:
    """How INDEX.json names the model: by its Hub id, or `local/<clean name>` for one that is in a folder.

    Raises:
        ValueError: if that cannot be the name of a folder.
    """
    name = provenance["model_id"]
    if is_local(provenance, MODEL_KEY):
        name = f"{LOCAL}/{public_name(str(provenance['clean_model_name']))}"
    if not re.fullmatch(MODEL_PATTERN, name):
        raise ValueError(f"path: the model's name {name!r} cannot be that of a folder; rename the model's own folder")
    return name


def is_local(provenance: Mapping[str, Any], key: str) -> bool:
    """Whether `model_id` or `dataset.repo_id` is of something that is, or was where it was published, on no Hub."""
    if key in provenance.get(LOCAL_KEY, ()):
        return True
    if key == MODEL_KEY:
        return provenance.get("model_commit") is None or is_path(provenance["model_id"])
    return is_path(str(provenance["dataset"]["repo_id"]))


def public_json(folder: TunedLensFolder) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Configuration and provenance without local paths, and what stands for the paths that were named as such.

    The provenance's `local` lists the keys whose names are of local files or folders: nobody should look for them on
    the Hub.
    """
    config, provenance = folder.config, folder.provenance
    local = [key for key in (MODEL_KEY, DATASET_KEY) if is_local(provenance, key)]
    models = {str(config["base_model_name_or_path"]), str(provenance["model_id"])} if MODEL_KEY in local else ()
    stand_ins = {name: Path(name).expanduser().resolve().name for name in models}
    text = str(provenance["dataset"]["repo_id"])
    # of "samples of <model>", the model has its stand-in already
    if is_path(text) and not any(name in text for name in stand_ins):
        stand_ins[text] = public_name(text)
    public = without_paths(provenance, stand_ins) | {LOCAL_KEY: local}
    return without_paths(config, stand_ins), public, stand_ins
