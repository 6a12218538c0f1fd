"""The licence of the model that a lens belongs to: its name and its texts, from where the model is.

A text comes from the model's own repository or folder, or from a file that the user passes. None is made up: where
there is none, the name that the model's card gives, and a link to the card, have to do.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfApi, metadata_load

from ..hub_connection import asking_hub
from .card_metadata import LICENSES, check_card_metadata

logger = logging.getLogger(__name__)

TEXT_PATTERN = r"(?i)[\w.-]*(licen[sc]e|copying|notice|terms|use_policy)[\w.-]*"
TEXT_SUFFIXES = ("", ".txt", ".md")
CARD = "README.md"


class UpstreamLicense(NamedTuple):
    """What is known of a model's licence."""

    name: str | None
    """As the Hub names licences; None if none is stated."""
    title: str | None
    """What the card calls a licence that the Hub has no name for."""
    link: str | None
    """Where the card says that it is found."""
    texts: Mapping[str, bytes]
    """File name -> content."""


def upstream_license(
    model: str, commit: str | None, license: str | None = None, files: Sequence[str | Path] = ()
) -> UpstreamLicense:
    """The licence of a model; what the caller passes goes before what the model's repository or folder says.

    Args:
        model: Hub id, or folder.
        commit: of the Hub id; None for a folder.
        license: its name, as the Hub has it.
        files: its texts.

    Raises:
        ValueError: for a name that the Hub does not know, files that are not there or whose names are the same, or a
            model whose licence cannot be read and is not passed.
        HubError: if the Hub cannot be reached, or fails.
    """
    check_card_metadata(license, ())
    texts = _passed_texts(files)
    if license is not None and texts:
        return UpstreamLicense(license, None, None, texts)
    if commit is None:
        folder = Path(model).expanduser()
        found = _in_folder(folder) if folder.is_dir() else UpstreamLicense(None, None, None, {})
    else:
        try:
            found = _on_hub(model, commit)
        except ValueError as error:
            raise ValueError(
                f"license: that of {model!r} cannot be read ({error}); pass license and license_files"
            ) from error
    name, title = (found.name, found.title) if license is None else (license, None)
    return UpstreamLicense(name, title, found.link, texts or found.texts)


def license_in_card(model: str, commit: str | None) -> UpstreamLicense:
    """What the head of a model's card says of its licence, without any text; of a card that cannot be read, nothing.

    For work that must not end on that, as a training; of a model on the Hub it asks for one small file.

    Args:
        model: Hub id, or folder.
        commit: of the Hub id; None for a folder.
    """
    nothing = UpstreamLicense(None, None, None, {})
    try:
        if commit is None:
            card = Path(model).expanduser() / CARD
            return _named(_head(card), {}) if card.is_file() else nothing
        with asking_hub(model, commit):
            return _named(_head(Path(HfApi().hf_hub_download(model, CARD, revision=commit))), {})
    except (ValueError, OSError) as error:
        logger.info("the licence of %s cannot be read from its card: %s", model, error)
        return nothing


def _passed_texts(files: Sequence[str | Path]) -> dict[str, bytes]:
    texts: dict[str, bytes] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise ValueError(f"license_files: no file at {str(file)!r}; pass the text of the model's licence")
        name = re.sub(r"[^\w.-]", "_", file.name.lstrip("."))
        if name in texts:
            raise ValueError(f"license_files: two files are named {name!r}; rename one")
        texts[name] = file.read_bytes()
    return texts


def _in_folder(folder: Path) -> UpstreamLicense:
    """The licence of a model in a folder, from its card and its files."""
    card = folder / CARD
    data = _head(card) if card.is_file() else {}
    texts = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file() and _is_text(file)}
    return _named(data, texts)


def _head(card: Path) -> dict[str, Any]:
    """The head of a card.

    Raises:
        ValueError: if it is no YAML.
    """
    try:
        return metadata_load(card) or {}
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"license: the head of {card.name} beside the model cannot be read ({first})") from error


def _on_hub(model: str, commit: str) -> UpstreamLicense:
    """The same of a model on the Hub, at a commit."""
    with asking_hub(model, commit):
        info = HfApi().model_info(model, revision=commit)
        data = info.card_data.to_dict() if info.card_data is not None else {}
        names = [sibling.rfilename for sibling in info.siblings or [] if "/" not in sibling.rfilename]
        texts = {
            name: Path(HfApi().hf_hub_download(model, name, revision=commit)).read_bytes()
            for name in names
            if _is_text(Path(name))
        }
    return _named(data, texts)


def _is_text(file: Path) -> bool:
    return re.fullmatch(TEXT_PATTERN, file.name) is not None and file.suffix.lower() in TEXT_SUFFIXES


def _named(card: Mapping[str, Any], texts: Mapping[str, bytes]) -> UpstreamLicense:
    """What the head of a card says of the licence."""
    name = card.get("license")
    if isinstance(name, list):
        name = name[0] if len(name) == 1 else "other"
    known = name if name is None or name in LICENSES else "other"
    title = card.get("license_name") or (name if name != known else None)
    return UpstreamLicense(known, title, card.get("license_link"), texts)
