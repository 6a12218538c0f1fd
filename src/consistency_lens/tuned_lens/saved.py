"""A saved tuned lens with the model that it was fitted to, or that model alone."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.subject_loading import DTYPES, load_subject_and_tokenizer
from ..lens_artifact import WEIGHTS_FILE, subject_location
from .configuration_tuned_lens import TunedLensConfig
from .modeling_tuned_lens import TunedLens


class OpenedLens(NamedTuple):
    """A model, and its tuned lens if there is one."""

    lens: TunedLens | None
    subject: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: str
    """Hub id or folder of the model."""
    revision: str | None
    """The commit on the Hub; None for a local folder."""


def is_lens(folder: Path) -> bool:
    """Whether a folder holds a saved lens."""
    return (folder / "config.json").is_file() and (folder / WEIGHTS_FILE).is_file()


def open_lens(
    folder: Path | None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> OpenedLens:
    """Loads a model, and lays its tuned lens over it.

    Args:
        folder: of the lens; None for the model alone.
        model: Hub id or folder; None for the one that the lens names.
        revision: commit, tag or branch of the model; None for the one that the lens was fitted at.
        dtype: of the weights; None for the one that the lens was fitted with, else float32.
        device: None for a GPU if there is one.

    Raises:
        ValueError: if one of them is not to be found, or the lens is of another model or revision.
    """
    config = None if folder is None else _read_config(folder)
    name = model or (None if config is None else subject_location(config))
    if name is None:
        raise ValueError("model: got none; pass a Hub id or folder, e.g. --model gpt2")
    if config is not None and revision is None and name in (config.base_model_name_or_path, subject_location(config)):
        revision = config.base_model_revision
    recorded = None if config is None else config.base_config.get("dtype")
    loaded = load_subject_and_tokenizer(
        name,
        revision,
        dtype or (recorded if recorded in DTYPES else "float32"),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if folder is None or config is None:
        return OpenedLens(None, loaded.model, loaded.tokenizer, name, loaded.revision)
    fitted_at = config.base_model_revision
    if fitted_at is not None and loaded.revision is not None and fitted_at != loaded.revision:
        raise ValueError(
            f"revision: {name!r} is at {loaded.revision}, the lens {str(folder)!r} was fitted at {fitted_at}; pass "
            f"--revision {fitted_at}"
        )
    lens = TunedLens.from_pretrained(folder, config=config, base_model=loaded.model)
    if lens.tokenizer is None:
        lens.tokenizer = loaded.tokenizer
    return OpenedLens(lens, loaded.model, lens.tokenizer, name, loaded.revision)


def _read_config(folder: Path) -> TunedLensConfig:
    if not is_lens(folder):
        raise ValueError(f"lens: no tuned lens at {str(folder)!r}; pass the folder of one")
    config = TunedLensConfig.from_pretrained(folder)
    found = TunedLensConfig.get_config_dict(folder)[0].get("model_type")
    if found != TunedLensConfig.model_type:
        raise ValueError(f"lens: {str(folder)!r} is a {found} model; pass the folder of a tuned lens")
    return config
