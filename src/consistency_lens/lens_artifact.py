"""Artifacts of trained tensors: what a lens, a decoder or an encoder is saved as, and how it is loaded.

An artifact holds the tensors that were trained and nothing else: `from_pretrained` takes the subject at its pinned
revision (or rebuilds its architecture, where the whole clone was trained) and lays the trained tensors over it.
"""

import json
import os
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from .atomic_write import write_json, write_tensors
from .quantised import keep_gradients

WEIGHTS_FILE = "model.safetensors"
PROVENANCE_FILE = "provenance.json"
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


def base_from_config(base_config: dict[str, Any], base_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """The subject's architecture with untrained weights, for an artifact that holds them all.

    Args:
        base_config: `config.to_dict()` of the subject.
        base_kwargs: `dtype`, `attn_implementation`, `trust_remote_code` and a `device_map` of one device.

    Raises:
        ValueError: if weights are to be quantised or spread over devices, which needs a subject that is loaded.
    """
    kwargs = dict(base_kwargs or {})
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


class TrainedTensorsModel(PreTrainedModel):
    """A `PreTrainedModel` whose artifact holds only what was trained."""

    config_class: type[PreTrainedConfig]
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    # The inner model is built (and checked) before it is wrapped, so the wrapper accepts whatever the subject has.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    tokenizer: PreTrainedTokenizerBase | None = None
    provenance: dict[str, Any] | None = None
    base_kwargs: dict[str, Any] = {}  # how the subject is to be loaded, should it be asked for later

    def initialize_weights(self, *args: Any, **kwargs: Any) -> None:
        """Draws nothing: every weight comes from the subject, from an identity or from an artifact."""

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; ValueError if the lens has none."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: this lens has none; set lens.tokenizer to the subject's tokenizer")
        return self.tokenizer

    def trained_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of everything an artifact must hold; a tensor with two names is listed once."""
        raise NotImplementedError

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **hub_kwargs: Any,
    ) -> None:
        """Writes config.json, model.safetensors (trained tensors only), the tokenizer and provenance.json.

        Args:
            save_directory: folder; made if missing.
            is_main_process: other processes write nothing.
            state_dict: gathered full-precision tensors by name, where a sharding strategy holds them elsewhere.
            push_to_hub: also upload the folder; `hub_kwargs` go to `huggingface_hub`.

        Raises:
            ValueError: if a trained tensor holds NaN or infinity; nothing is written then.
        """
        if not is_main_process:
            return
        tensors = self.trained_tensors()
        if state_dict is not None:
            tensors = {name: state_dict.get(name, tensor) for name, tensor in tensors.items()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(f"save: {len(broken)} tensors hold NaN or infinity (first: {broken[0]}); nothing written")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = None  # each tensor keeps its own precision; there is no one dtype to announce
        self.config.save_pretrained(folder)
        write_tensors(folder / WEIGHTS_FILE, tensors)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.provenance is not None:
            write_json(folder / PROVENANCE_FILE, self.provenance)
        if push_to_hub:
            from huggingface_hub import HfApi

            api = HfApi(token=hub_kwargs.pop("token", None))
            repo_id, private = hub_kwargs.pop("repo_id", folder.name), hub_kwargs.pop("private", None)
            repo = api.create_repo(repo_id, exist_ok=True, private=private)
            api.upload_folder(
                repo_id=repo.repo_id, folder_path=folder, ignore_patterns=["data/*", "checkpoint-*"], **hub_kwargs
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: Any = None,
        base_model: PreTrainedModel | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        _from_auto: bool = False,
        **hub_kwargs: Any,
    ) -> Self:
        """Loads an artifact: the subject at its pinned revision, the trained tensors laid over it.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the artifact.
            config: a loaded configuration; read from the artifact if None.
            base_model: the subject, already loaded or as a path, in place of the one that the artifact names.
            dtype, device_map, quantization_config, attn_implementation: passed on to the loading of the subject.
            trust_remote_code: passed on to the loading of the subject.
            hub_kwargs: `revision, subfolder, token, cache_dir, local_files_only, force_download` of the artifact.

        Raises:
            ValueError: if tensors are missing or left over, or the subject is not to be found.
        """
        path = str(pretrained_model_name_or_path)
        config = config if config is not None else cls.config_class.from_pretrained(path, **hub_kwargs)
        tensors = load_file(cast(str, cached_file(path, WEIGHTS_FILE, **hub_kwargs)))
        base_kwargs = {
            "dtype": dtype,
            "device_map": device_map,
            "quantization_config": quantization_config,
            "attn_implementation": attn_implementation,
            "trust_remote_code": trust_remote_code,
        }
        base_kwargs = {name: value for name, value in base_kwargs.items() if value not in (None, False)}
        model = cls.from_artifact_config(config, base_model, base_kwargs)
        model.base_kwargs = base_kwargs
        model.load_trained_tensors(tensors)
        if cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs):
            model.tokenizer = AutoTokenizer.from_pretrained(path, **hub_kwargs)
        provenance = cached_file(path, PROVENANCE_FILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if provenance:
            model.provenance = json.loads(Path(provenance).read_text(encoding="utf-8"))
        return model.eval()

    @classmethod
    def from_artifact_config(
        cls, config: Any, base_model: PreTrainedModel | str | None, base_kwargs: dict[str, Any]
    ) -> Self:
        """Builds the module tree that the trained tensors are then laid over."""
        raise NotImplementedError

    def load_trained_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies an artifact's tensors into place.

        Raises:
            ValueError: if the names differ from those that this configuration trains.
        """
        expected = self.trained_tensors()
        missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        if missing or unexpected:
            raise ValueError(
                f"artifact: {len(missing)} tensors missing {sorted(missing)[:2]}, {len(unexpected)} unexpected "
                f"{sorted(unexpected)[:2]}; it does not belong to this configuration"
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                if tensor.shape != tensors[name].shape:
                    raise ValueError(
                        f"artifact: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(tensor.shape)}; "
                        "it was trained on another subject"
                    )
                tensor.copy_(tensors[name])


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
            lens was made for.
    """
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
                f"subject: no model at {name!r} (revision {revision}); pass base_model=<path, Hub id or model> "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
    keep_gradients(subject)
    check_architecture(config.base_config, subject)
    return subject


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
