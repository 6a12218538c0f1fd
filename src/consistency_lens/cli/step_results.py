"""What the steps of a pipeline have left in their folders: whether it is done, by which settings, and its removal."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Step

# Settings that change nothing about the result.
INDIFFERENT = {"resume_from_checkpoint", "disable_tqdm", "report_to", "logging_steps", "save_total_limit", "num_proc"}


def settings_file(recipe_folder: Path, step: str) -> Path:
    """Where the settings of a step lie: what its `--config` reads."""
    return recipe_folder / "steps" / f"{step}.yaml"


def check_cache(path: Path, settings: Mapping[str, Any]) -> None:
    """ValueError if the cache at `path` was made with other settings."""
    from ..data.activation_cache import PROVENANCE_FILE

    found = json.loads((path / PROVENANCE_FILE).read_text(encoding="utf-8"))
    positions = found["positions"]
    had = {
        "positions_per_sequence": positions["per_sequence"],
        "min_position": positions["min_position"],
        "cache_dtype": found["dtype"],
        "max_norm": found["max_norm"],
        "seed": found["seed"],
    }
    for name, value in had.items():
        if settings.get(name) != value:
            raise ValueError(
                f"cache: {str(path.parent)!r} was made with {name} {value!r}, now it is {settings.get(name)!r}; "
                "choose another cache_dir, or make it again with --force cache"
            )


def is_trained(folder: Path) -> bool:
    """Whether a finished lens lies in the folder, with the record that training writes last."""
    from ..lens_artifact import WEIGHTS_FILE
    from ..training.interruption import INTERRUPTED_FILE

    finished = (folder / WEIGHTS_FILE).is_file() and (folder / "run.json").is_file()
    return finished and not (folder / INTERRUPTED_FILE).exists()


def is_evaluated(folder: Path, lens: Path) -> bool:
    """Whether `eval` has written its figures into the folder since the lens was trained, which writes some too."""
    file = folder / "metrics.json"
    if not file.is_file() or file.stat().st_mtime < (lens / "run.json").stat().st_mtime:
        return False
    return "evaluation" in json.loads(file.read_text(encoding="utf-8")).get("arguments", {})


def check_same(step: "Step", folder: Path) -> None:
    """ValueError if what is there was made, by this command, with other settings than it is asked for now."""
    from .parser import read_yaml

    file = settings_file(folder, step.name)
    had = read_yaml(file) if file.is_file() else step.settings
    for name in sorted(had.keys() | step.settings.keys()):
        if name not in INDIFFERENT and had.get(name) != step.settings.get(name):
            raise ValueError(
                f"{step.name}: what lies in {str(step.result)!r} was made with {name} {had.get(name)!r}, now it is "
                f"{step.settings.get(name)!r}; choose another output_dir, or make it again with --force {step.name}"
            )


def clear(step: "Step") -> None:
    """Removes what an earlier run of a step has left, and nothing else, so that it is done again."""
    from ..data.activation_cache import BUILDING_FILE, PROVENANCE_FILE
    from ..data.tokenized_corpus import SPLITS, TOKENIZATION_FILE
    from ..training.interruption import INTERRUPTED_FILE

    if step.name == "tokenize" and (step.result / TOKENIZATION_FILE).is_file():
        shutil.rmtree(step.result)
    elif step.name == "cache":
        for folder in (step.result / split for split in SPLITS):
            if any((folder / name).is_file() for name in (PROVENANCE_FILE, BUILDING_FILE)):
                shutil.rmtree(folder)
    elif step.name == "train":
        for folder in step.result.glob("checkpoint-*"):
            shutil.rmtree(folder)
        for name in ("run.json", "metrics.json", INTERRUPTED_FILE):
            (step.result / name).unlink(missing_ok=True)
