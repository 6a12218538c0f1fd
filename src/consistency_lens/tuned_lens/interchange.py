"""Lenses that AlignmentResearch/tuned-lens wrote, read into a `TunedLens`.

Theirs is `norm(h + h W_i^T + b_i)` decoded by the subject's head, with full matrices and no temperature. Translator i
reads `hidden_states[i]` of transformers: i = 0 the embeddings, i = k + 1 our layer k; the last layer has none.
The files are config.json and params.pt, the `state_dict` of the list of translators. torch reads it with
`weights_only=True`, so that nothing but tensors can come out of it.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import extract_commit_hash

from ..data.activation_cache import file_hash
from ..hub_connection import asking_hub
from .lens_places import CONFIG_FILE, PARAMETERS_FILE
from .modeling_tuned_lens import TunedLens
from .readout import Readout

logger = logging.getLogger(__name__)

PUBLISHED = "AlignmentResearch/tuned-lens"
LENS_TYPE = "linear_tuned_lens"
# the hash is made of a few entries to one decimal or two digits, which a subject in another precision may round apart
HASHED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Files(NamedTuple):
    """The two files of a lens, here."""

    config: Path
    parameters: Path
    source: dict[str, Any]
    """Where they come from, for the provenance."""


def from_alignment_research(
    path_or_repo: str | Path,
    subject: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    repo_type: str = "space",
    check_unembedding: bool = True,
) -> TunedLens:
    """A lens as tuned-lens publishes it, for everything that a `TunedLens` can do.

    Args:
        path_or_repo: a folder with config.json and params.pt, or a repository on the Hub, such as
            "AlignmentResearch/tuned-lens".
        subject: the model that the lens was fitted on; it is frozen.
        subfolder: of the folder or repository; on the Hub by default lens/<name of the subject>, as they have it.
        revision: commit, tag or branch on the Hub.
        repo_type: of the repository; theirs is a Space.
        check_unembedding: refuse a lens whose hash of the unembedding is not that of the subject.

    Raises:
        ValueError: if a file is missing or is not what it should be, or the lens was fitted on another model.
        HubError: if the Hub cannot be reached, or fails.
    """
    files = _find(path_or_repo, subfolder or "", revision, repo_type, subject.config.name_or_path or "")
    config = read_config(files.config)
    lens = TunedLens.for_model(subject, tokenizer, learn_temperature=False, translator_place="before_norm")
    _check_sizes(config, lens)
    if check_unembedding:
        _check_unembedding(config, lens.readout)
    parameters = _read_parameters(files.parameters)
    _check_parameters(parameters, lens)
    _lay_in(parameters, lens)
    lens.provenance = {
        "enabled": True,
        "model_id": subject.config.name_or_path,
        "source": files.source,
        "source_config": config,
        "translator": {
            "rank": None,
            "temperature": False,
            "parameters": sum(parameter.numel() for parameter in lens.translators.parameters()),
            "place": "before_norm",
        },
    }
    return lens


def unembedding_hash(weight: Tensor) -> str:
    """What tuned-lens calls `unembed_hash`: SHA-256 of how numpy prints the matrix to one decimal, corners alone."""
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False, sign="-", floatmode="maxprec"):
        printed = np.array_str(weight.detach().cpu().float().numpy(), precision=1)
    return hashlib.sha256(printed.encode()).hexdigest()


def _find(path_or_repo: str | Path, subfolder: str, revision: str | None, repo_type: str, subject_name: str) -> _Files:
    folder = Path(path_or_repo)
    if not folder.is_dir():
        return _fetch(str(path_or_repo), subfolder or f"lens/{subject_name}", revision, repo_type)
    folder = folder / subfolder
    for name in (CONFIG_FILE, PARAMETERS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"lens: {str(folder)!r} has no {name}; pass the folder with {CONFIG_FILE} and params.pt")
    source = {"folder": str(folder), "sha256": file_hash(folder / PARAMETERS_FILE)}
    return _Files(folder / CONFIG_FILE, folder / PARAMETERS_FILE, source)


def _fetch(repo: str, subfolder: str, revision: str | None, repo_type: str) -> _Files:
    """Both files from the Hub, of one commit."""
    found = []
    for name in (CONFIG_FILE, PARAMETERS_FILE):
        missing = None
        with asking_hub(repo, revision):
            try:
                path = hf_hub_download(repo, name, repo_type=repo_type, subfolder=subfolder, revision=revision)
            except EntryNotFoundError as error:
                missing = error
        if missing is not None:
            raise ValueError(
                f"lens: {repo!r} has no {subfolder}/{name}; pass as subfolder the place of a lens in it, such as "
                "lens/EleutherAI/pythia-160m"
            ) from missing
        found.append(Path(path))
        revision = extract_commit_hash(path, None) or revision
    source = {"repo_id": repo, "repo_type": repo_type, "subfolder": subfolder, "revision": revision}
    source["sha256"] = file_hash(found[1])
    return _Files(found[0], found[1], source)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of tuned-lens.

    Raises:
        ValueError: if it is none, or of a lens of another type.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"lens: {str(path)!r} is no JSON ({error}); download it again") from error
    expected = {"base_model_name_or_path", "d_model", "num_hidden_layers"}
    if not isinstance(config, dict) or not expected <= config.keys():
        raise ValueError(
            f"lens: {str(path)!r} is no configuration of tuned-lens (it lacks one of {', '.join(sorted(expected))}); "
            "for a lens of this library use TunedLens.from_pretrained"
        )
    lens_type = config.get("lens_type", LENS_TYPE)
    if lens_type != LENS_TYPE:
        raise ValueError(f"lens: lens_type is {lens_type!r}, only {LENS_TYPE} can be read; pass a lens of that type")
    return config


def _check_sizes(config: dict[str, Any], lens: TunedLens) -> None:
    for field, own in (("d_model", lens.config.width), ("num_hidden_layers", lens.num_layers)):
        if config[field] != own:
            raise ValueError(
                f"subject: the lens has {field} {config[field]}, the subject {own}; pass the model that it was "
                f"fitted on ({config['base_model_name_or_path']!r})"
            )


def _check_unembedding(config: dict[str, Any], readout: Readout) -> None:
    expected = config.get("unembed_hash")
    if expected is None:
        logger.warning("the lens has no unembed_hash: nothing shows that it was fitted on this model")
        return
    if expected not in {unembedding_hash(readout.weight.to(dtype)) for dtype in HASHED_DTYPES}:
        raise ValueError(
            f"subject: its unembedding is not the one that the lens was fitted on (unembed_hash {expected[:12]}…); "
            f"pass {config['base_model_name_or_path']!r} at revision {config.get('base_model_revision') or 'main'} "
            "(from Python, from_alignment_research(..., check_unembedding=False) reads another)"
        )


def _read_parameters(path: Path) -> Any:
    """What is in params.pt, where that is tensors and their names."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind fails in as many ways as there are kinds
        raise ValueError(
            f"lens: {str(path)!r} holds more than tensors, or is damaged ({type(error).__name__}); it was not "
            "unpickled, do not trust it"
        ) from error


def _check_parameters(parameters: Any, lens: TunedLens) -> None:
    width, layers = lens.config.width, range(lens.num_layers)
    shapes = {f"{i}.weight": (width, width) for i in layers} | {f"{i}.bias": (width,) for i in layers}
    found = set(parameters) if isinstance(parameters, dict) else {type(parameters).__name__}
    if found != shapes.keys():
        differing = ", ".join(sorted(map(str, found ^ shapes.keys()))[:3])
        raise ValueError(
            f"lens: {PARAMETERS_FILE} must hold weight and bias of {lens.num_layers} translators, it differs in "
            f"{differing}; it is no lens of this model"
        )
    for name, shape in shapes.items():
        tensor = parameters[name]
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"lens: {name} in {PARAMETERS_FILE} must have shape {shape}, got {got}; take another lens"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"lens: {name} in {PARAMETERS_FILE} holds NaN or infinity; download it again")


@torch.no_grad()
def _lay_in(parameters: dict[str, Tensor], lens: TunedLens) -> None:
    for layer in range(lens.num_layers - 1):
        translator: Any = lens.translators[layer]
        translator.W.copy_(parameters[f"{layer + 1}.weight"].T)
        translator.c.copy_(parameters[f"{layer + 1}.bias"])
    logger.info("the translator of the embeddings is left out: layers begin with the output of block 0")
