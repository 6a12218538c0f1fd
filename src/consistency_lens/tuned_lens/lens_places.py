"""Where the tuned lens of a model lies unless it is said, and whether a folder holds one."""

import json
from pathlib import Path
from typing import Any

from ..lens_artifact import WEIGHTS_FILE
from .configuration_tuned_lens import TunedLensConfig

LENSES_FOLDER = Path("tuned_lenses")
CONFIG_FILE, METRICS_FILE = "config.json", "metrics.json"
PARAMETERS_FILE = "params.pt"  # the weights of a lens of AlignmentResearch/tuned-lens


def clean_name(model: str) -> str:
    """The last part of a Hub id or path: what folders of lenses and of runs are called."""
    return Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rpartition("/")[2]


def default_folder(model: str) -> Path:
    """Where the lens of a model lies unless it is said: tuned_lenses/<name of the model>."""
    return LENSES_FOLDER / clean_name(model)


def is_lens(folder: Path) -> bool:
    """Whether a folder holds a saved lens, of this library or of AlignmentResearch/tuned-lens."""
    weights = (folder / WEIGHTS_FILE, folder / PARAMETERS_FILE)
    return (folder / CONFIG_FILE).is_file() and any(file.is_file() for file in weights)


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a lens of AlignmentResearch/tuned-lens."""
    return (folder / PARAMETERS_FILE).is_file()


def is_own(folder: Path) -> bool:
    """Whether the configuration in a folder is of this library's tuned lens, whatever else lies there."""
    try:
        config: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == TunedLensConfig.model_type
