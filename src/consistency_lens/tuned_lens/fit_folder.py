"""The folder that a lens is fitted in: what lies there, and whether a fit may go on with it."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..atomic_write import write_json
from ..lens_artifact import PROVENANCE_FILE, WEIGHTS_FILE
from .configuration_tuned_lens import TunedLensConfig
from .lens_places import METRICS_FILE

SETTINGS_FILE = "fit.json"
BLOCKS_FOLDER, RIDGE_FOLDER = "blocks", "ridge"
# How the names of settings begin of which a fit that goes on may have others: they leave the lens as it is.
FREE = (
    "force", "device", "use_cpu", "local_rank", "ddp_", "disable_tqdm", "log", "report_to", "run_name", "project",
    "trackio", "dataloader_num", "dataloader_pin", "dataloader_prefetch", "dataloader_persistent",
)  # fmt: skip


def check_folder(folder: Path) -> None:
    """Raises a ValueError for a folder that holds something else than tuned lenses have, forced or not."""
    if (folder / SETTINGS_FILE).is_file():
        return
    config = folder / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind != TunedLensConfig.model_type and (config.is_file() or (folder / PROVENANCE_FILE).is_file()):
        what = "a data set or its like" if kind is None else f"a model of type {kind!r}"
        raise ValueError(f"output_dir: {str(folder)!r} holds {what}; take another folder")


def lens_in(folder: Path, model: str) -> bool:
    """Whether a folder has a fitted lens.

    Raises:
        ValueError: if it is the lens of another model.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return False
    fitted_to = read_json(file)["model_id"]
    if Path(fitted_to).resolve() != Path(model).resolve():
        raise ValueError(
            f"output_dir: {str(folder)!r} has the lens of {fitted_to!r}, not of {model!r}; take another, or pass "
            "--force to replace it"
        )
    return True


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides the lens and is another now, in words."""
    counts = [name for name in before if name in now and not name.startswith(FREE)]
    return [f"{name} {before[name]!r}, now {now[name]!r}" for name in counts if before[name] != now[name]]


def claim(folder: Path, settings: dict[str, Any], force: bool = False) -> None:
    """Writes the settings into the folder, where an unfinished fit has to have the same.

    Raises:
        ValueError: for what a fit of other settings has left, unless it is forced.
    """
    if force:
        remove_work(folder)
        for name in (PROVENANCE_FILE, WEIGHTS_FILE, METRICS_FILE, SETTINGS_FILE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / BLOCKS_FOLDER, ignore_errors=True)
    before = read_json(folder / SETTINGS_FILE)
    others = differences(before, settings)
    if others and work_in(folder):
        raise ValueError(
            f"output_dir: {str(folder)!r} has an unfinished fit with {others[0]}; set it as it was, take another "
            "output_dir, or pass --force to fit anew"
        )
    write_json(folder / SETTINGS_FILE, settings if others else before | settings)


def work_in(folder: Path) -> list[Path]:
    """What only an unfinished fit needs, but for its text."""
    return [path for path in (folder / RIDGE_FOLDER, *folder.glob("checkpoint-*")) if path.is_dir()]


def remove_work(folder: Path) -> None:
    for path in work_in(folder):
        shutil.rmtree(path, ignore_errors=True)
