"""The subject of a saved lens: where it lies, how it is loaded, and whether it is the one the lens was made for."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .fingerprints import weights_hash
from .quantised import keep_gradients

logger = logging.getLogger(__name__)

# How the subject's repository is asked for, as far as that is said of the artifact's too.
SUBJECT_HUB_KWARGS = ("token", "cache_dir", "local_files_only")
# What two subjects must share for a lens of the one to fit the other, as the families name it in their configs.
ARCHITECTURE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_layers",
)
PINNED = "pinned_weights"  # the `PinnedWeights` among the arguments that a subject is loaded with


class PinnedWeights(NamedTuple):
    """What an artifact says of its subject's weights, and how strictly it is held to that."""

    sha256: str
    """`fingerprints.weights_hash` of the subject, as it was loaded for the training."""
    always: bool
    """Compare them even where a commit pins them too, and refuse a subject that cannot be compared."""


def base_from_config(base_config: dict[str, Any], base_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """The subject's architecture with untrained weights, for an artifact that holds them all.

    Args:
        base_config: `config.to_dict()` of the subject.
        base_kwargs: `dtype`, `attn_implementation`, `trust_remote_code` and a `device_map` of one device.

    Raises:
        ValueError: if weights are to be quantised or spread over devices, which needs a subject that is loaded.
    """
    not_of_it = (*SUBJECT_HUB_KWARGS, PINNED)
    kwargs = {name: value for name, value in (base_kwargs or {}).items() if name not in not_of_it}
    device = kwargs.pop("device_map", None)
    if "quantization_config" in kwargs or isinstance(device, dict) or device in ("auto", "balanced", "sequential"):
        raise ValueError(
            "from_pretrained: a fully trained clone can be neither quantised nor spread over devices; pass a dtype "
            "and a device_map of one device"
        )
    config = AutoConfig.for_model(**base_config)
    dtype = kwargs.pop("dtype", "auto")
    dtype = torch.float32 if dtype == "auto" else dtype  # what clones are trained and saved in
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    return model if device is None else model.to(device)


def subject_location(config: Any) -> str:
    """An artifact's subject: its Hub id or folder; a relative folder may also lie below a parent of the artifact's."""
    name, artifact = config.base_model_name_or_path, Path(config.name_or_path)
    if name and artifact.is_dir() and not Path(name).exists():
        for parent in artifact.resolve().parents:
            if (parent / name / "config.json").is_file():
                return str(parent / name)
    return name


def load_subject(
    config: Any, base_model: PreTrainedModel | str | None, base_kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The subject's model: `base_model` itself, or loaded from its path or from where the configuration says.

    Raises:
        ValueError: if it cannot be found, naming the place and how to pass another, or if it is not the model that the
            lens was made for: by its architecture and, where `base_kwargs` pins them, by its weights.
    """
    base_kwargs = dict(base_kwargs)
    pinned: PinnedWeights | None = base_kwargs.pop(PINNED, None)
    if isinstance(base_model, PreTrainedModel):
        subject = base_model
    else:
        name = base_model or subject_location(config)
        # the precision that the lens was trained with; a checkpoint's own may be another
        recorded = {name: config.base_config.get(name) for name in ("dtype", "quantization_config")}
        base_kwargs = {"dtype": "auto", **{k: v for k, v in recorded.items() if v is not None}, **base_kwargs}
        revision = None if base_model else config.base_model_revision
        try:
            subject = AutoModelForCausalLM.from_pretrained(name, revision=revision, **base_kwargs).eval()
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(
                f"subject: no model at {name!r} (revision {revision}); pass base_model=<path, Hub id or model>, or "
                f"the token of a private one ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
    keep_gradients(subject)
    check_architecture(config.base_config, subject)
    by_commit = base_model is None and config.base_model_revision is not None
    if pinned is not None and (pinned.always or not by_commit):
        check_weights(config.base_config, subject, pinned)
    return subject


def load_subject_tokenizer(config: Any, base_kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the subject that a configuration names, at its pinned revision.

    Raises:
        ValueError: if it cannot be loaded.
    """
    name = subject_location(config)
    hub_kwargs = {key: base_kwargs[key] for key in SUBJECT_HUB_KWARGS if key in base_kwargs}
    try:
        return AutoTokenizer.from_pretrained(name, revision=config.base_model_revision, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: none at {name!r} (revision {config.base_model_revision}); set lens.tokenizer to the "
            f"subject's ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def check_architecture(base_config: dict[str, Any], subject: PreTrainedModel) -> None:
    """Checks that a subject has the family and the sizes that a lens was made for.

    Raises:
        ValueError: if not, naming the field and both values.
    """
    expected = base_config.get("text_config", base_config)
    actual = subject.config.get_text_config().to_dict()
    for name in ARCHITECTURE_FIELDS:
        if name in expected and expected[name] != actual.get(name):
            raise ValueError(
                f"subject: {name} is {actual.get(name)!r}, the lens was made for {expected[name]!r}; pass its own "
                "subject as base_model"
            )


def check_weights(base_config: dict[str, Any], subject: PreTrainedModel, pinned: PinnedWeights) -> None:
    """Checks that a subject has the very weights that a lens was made for.

    Weights that were loaded in another precision cannot be compared, and are let through unless they are asked for.

    Raises:
        ValueError: if it has not, naming both hashes.
    """
    why_not = why_not_compared(base_config, subject)
    if why_not is not None:
        if pinned.always:
            raise ValueError(f"verify_base: the subject is {why_not}; load it like that, or leave out verify_base")
        logger.info("the subject's weights are not compared: it is %s", why_not)
        return
    found = weights_hash(subject)
    if found != pinned.sha256:
        raise ValueError(
            f"subject: {subject.name_or_path!r} has weights of hash {found[:12]}…, the lens was made for "
            f"{pinned.sha256[:12]}…; pass its own subject as base_model (--model), or "
            "verify_base=False to read another (explain and serve: --verify_base false)"
        )


def why_not_compared(base_config: dict[str, Any], subject: PreTrainedModel) -> str | None:
    """In words, what keeps a subject's weights from being compared with a hash of the training's; None if nothing."""
    loaded, recorded = precision(subject.config.to_dict(), subject.dtype), precision(base_config)
    return None if loaded == recorded else f"loaded in {loaded}, the hash of its weights was taken in {recorded}"


def precision(config: dict[str, Any], dtype: torch.dtype | None = None) -> str:
    """How weights are held, in words: the dtype, and the bits if they are quantised."""
    quantization = config.get("quantization_config") or {}
    bits = [name.removeprefix("load_in_") for name in ("load_in_8bit", "load_in_4bit") if quantization.get(name)]
    words = [str(dtype or config.get("dtype") or torch.float32).removeprefix("torch."), *bits]
    return " in ".join(words)
