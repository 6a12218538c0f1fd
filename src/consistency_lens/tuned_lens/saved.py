"""A saved tuned lens with the model that it was fitted to, or that model alone."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..artifact_subject import subject_location
from ..data.subject_loading import DTYPES, load_subject_and_tokenizer
from ..own_subject import check_known
from .configuration_tuned_lens import TunedLensConfig
from .interchange import from_alignment_research, read_config
from .lens_places import CONFIG_FILE, is_foreign, is_lens
from .modeling_tuned_lens import TunedLens
from .readout import check_head


class OpenedLens(NamedTuple):
    """A model, and its tuned lens if there is one."""

    lens: TunedLens | None
    subject: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: str
    """Hub id or folder of the model."""
    revision: str | None
    """The commit on the Hub; None for a local folder."""


def open_lens(
    folder: Path | None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> OpenedLens:
    """Loads a model, and lays its tuned lens over it.

    Args:
        folder: of the lens, which may be one of AlignmentResearch/tuned-lens; None for the model alone.
        model: Hub id or folder; None for the one that the lens names.
        revision: commit, tag or branch of the model; None for the one that the lens was fitted at.
        dtype: of the weights; None for the one that the lens was fitted with, else float32.
        device: None for a GPU if there is one.

    Raises:
        ValueError: if one of them is not to be found, the model has no head, or the lens is of another model or
            revision.
    """
    made_for = None if folder is None else _made_for(folder)
    name = model or (None if made_for is None else made_for.model)
    if name is None:
        raise ValueError("model: got none; pass a Hub id or folder, e.g. --model gpt2")
    if made_for is not None and revision is None and name in made_for.names:
        revision = made_for.revision
    recorded = None if made_for is None else made_for.dtype
    loaded = load_subject_and_tokenizer(
        name,
        revision,
        dtype or (recorded if recorded in DTYPES else "float32"),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    check_head(name, loaded.model)
    if folder is None or made_for is None:
        return OpenedLens(None, loaded.model, loaded.tokenizer, name, loaded.revision)
    fitted_at = made_for.revision
    if fitted_at is not None and loaded.revision is not None and fitted_at != loaded.revision:
        raise ValueError(
            f"revision: {name!r} is at {loaded.revision}, the lens {str(folder)!r} was fitted at {fitted_at}; pass "
            f"--revision {fitted_at}"
        )
    if is_foreign(folder):
        lens = from_alignment_research(folder, loaded.model, loaded.tokenizer)
    else:
        lens = TunedLens.from_pretrained(folder, base_model=loaded.model)
    lens.tokenizer = lens.tokenizer or loaded.tokenizer
    return OpenedLens(lens, loaded.model, lens.tokenizer, name, loaded.revision)


def check_opened(opened: OpenedLens, is_named: bool, otherwise: str | None = None) -> None:
    """Checks that the model is known to be the one that its lens was fitted to; see `own_subject.check_known`."""
    lens = opened.lens
    assert lens is not None
    fitted_at = lens.config.base_model_revision
    by_commit = fitted_at is not None and fitted_at == opened.revision
    check_known(lens, opened.subject, by_commit, is_named, otherwise)


class _MadeFor(NamedTuple):
    """The model that a lens says it is for."""

    model: str
    names: tuple[str, ...]
    """By which that model may be asked for."""
    revision: str | None
    dtype: str | None


def _made_for(folder: Path) -> _MadeFor:
    if not is_lens(folder):
        raise ValueError(f"lens: no tuned lens at {str(folder)!r}; pass the folder of one")
    if is_foreign(folder):
        theirs = read_config(folder / CONFIG_FILE)
        model = theirs["base_model_name_or_path"]
        return _MadeFor(model, (model,), theirs.get("base_model_revision"), None)
    found = TunedLensConfig.get_config_dict(folder)[0].get("model_type")
    if found != TunedLensConfig.model_type:
        raise ValueError(f"lens: {str(folder)!r} is a {found} model; pass the folder of a tuned lens")
    config = TunedLensConfig.from_pretrained(folder)
    where, named = subject_location(config), config.base_model_name_or_path
    return _MadeFor(where, (where, named), config.base_model_revision, config.base_config.get("dtype"))
