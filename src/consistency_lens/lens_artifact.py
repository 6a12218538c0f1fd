"""Artifacts of trained tensors: what a lens, a decoder or an encoder is saved as, and how it is loaded.

An artifact holds the tensors that were trained and nothing else: `from_pretrained` takes the subject at its pinned
revision (or rebuilds its architecture, where the whole clone was trained) and lays the trained tensors over it.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .artifact_subject import PINNED, SUBJECT_HUB_KWARGS, PinnedWeights
from .atomic_write import write_json, write_tensors, write_text
from .hub_connection import check_token
from .hub_upload import CARD_FILE, card_text, commit_folder, create_repo, stage_artifact
from .remote_code import auto_map, remote_code

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PROVENANCE_FILE = "provenance.json"
# What `AutoModel` and `pipeline` hand on, and an artifact has no use for.
UNUSED_KWARGS = {"adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"}


class TrainedTensorsModel(PreTrainedModel):
    """A `PreTrainedModel` whose artifact holds only what was trained."""

    config_class: type[PreTrainedConfig]
    base_model_prefix = "base"
    artifact_kind = "lens"  # what it is, in a card
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
        include_code: bool = False,
        **push_kwargs: Any,
    ) -> None:
        """Writes config.json, model.safetensors (trained tensors only), the tokenizer and provenance.json.

        Args:
            save_directory: folder; made if missing.
            is_main_process: other processes write nothing.
            state_dict: gathered full-precision tensors by name, where a sharding strategy holds them elsewhere.
            push_to_hub: also upload them; `push_kwargs` are those of the method `push_to_hub`, whose `repo_id` is the
                folder's name by default.
            include_code: also write the modules that load the artifact with `trust_remote_code=True` where this
                package is not installed. What goes to the Hub, or came with its code, always has them.

        Raises:
            ValueError: if a trained tensor holds NaN or infinity; nothing is written then.
            TypeError: for other keyword arguments without `push_to_hub`.
        """
        if push_kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained: {next(iter(push_kwargs))} goes with push_to_hub=True")
        if not is_main_process:
            return
        folder = Path(save_directory)
        self._write_artifact(folder, state_dict, include_code or self._auto_class is not None)
        if push_to_hub:
            self.push_to_hub(push_kwargs.pop("repo_id", folder.name), _folder=folder, **push_kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        card: str | None = None,
        _folder: Path | None = None,
    ) -> CommitInfo:
        """Uploads the artifact to the Hub in one commit, with the code that loads it; makes the repository if needed.

        Args:
            repo_id: `name`, `user/name` or `organisation/name`.
            commit_message, commit_description, create_pr: of the commit, or of a pull request with it.
            private: whether a new repository is.
            revision: a branch, made if needed.
            tags: added to those of the card.
            card: text of README.md; without it the repository keeps its own, or gets a short one.

        Raises:
            ValueError: for a user's mistake, such as a token without the right, or a tensor with NaN or infinity.
            HubError: if the Hub cannot be reached, or fails.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder, staging = _folder or Path(temporary) / "saved", Path(temporary) / "staged"
            if _folder is None:
                self._write_artifact(folder)
            stage_artifact(folder, staging, type(self))
            repo_id = create_repo(repo_id, private=private, token=token, revision=revision)
            card_file = staging / CARD_FILE
            if card is None and not card_file.is_file():
                card = card_text(repo_id, self.artifact_kind, self.config, tags, token=token, revision=revision)
            if card is not None:
                write_text(card_file, card)
            return commit_folder(
                staging,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _write_artifact(
        self, folder: Path, state_dict: dict[str, Tensor] | None = None, with_code: bool = False
    ) -> None:
        tensors = self.trained_tensors()
        if state_dict is not None:
            tensors = {name: state_dict.get(name, tensor) for name, tensor in tensors.items()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(f"save: {len(broken)} tensors hold NaN or infinity (first: {broken[0]}); nothing written")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.dtype = None  # each tensor keeps its own precision; there is no one dtype to announce
        vars(self.config).pop("auto_map", None)  # it may come from another place than this one
        if with_code:
            self.config.auto_map = auto_map(type(self))
        self.config.save_pretrained(folder)
        for name, text in remote_code(type(self)).items() if with_code else ():
            write_text(folder / name, text)
        write_tensors(folder / WEIGHTS_FILE, tensors)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.provenance is not None:
            write_json(folder / PROVENANCE_FILE, self.provenance)

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
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        verify_base: bool | None = None,
        **unused: Any,
    ) -> Self:
        """Loads an artifact: the subject at its pinned revision, the trained tensors laid over it.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the artifact.
            config: a loaded configuration; read from the artifact if None.
            base_model: the subject, already loaded or as a path, in place of the one that the artifact names.
            dtype, device_map, quantization_config, attn_implementation, trust_remote_code: of the subject. Trained
                tensors keep the precision that they were trained in.
            revision, subfolder, force_download: of the artifact; its configuration pins the subject's own revision.
            token, cache_dir, local_files_only: of both.
            verify_base: whether the subject must have the weights that the lens was made for, by their hash. None
                compares weights that no commit pins (a folder's, a `base_model`'s) and that are loaded in the
                precision that they had then; True compares all or refuses; False takes any model of the architecture,
                such as a fine-tuned one.
            unused: what `AutoModel` hands on.

        Raises:
            ValueError: if tensors are missing or left over, a file is broken, or the subject is not to be found or not
                the one that the lens was made for.
            OSError: if the artifact or a file of it is not to be found, as `transformers` words it.
            TypeError: for another keyword argument.
        """
        for name in unused.keys() - UNUSED_KWARGS:
            raise TypeError(f"from_pretrained: there is no argument {name!r}")
        check_token(token)
        files = ArtifactFiles(
            str(pretrained_model_name_or_path),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = config if config is not None else cls.config_class.from_pretrained(files.path, **files.hub_kwargs)
        base_kwargs = {
            "dtype": dtype,
            "device_map": device_map,
            "quantization_config": quantization_config,
            "attn_implementation": attn_implementation or config._attn_implementation,
            "trust_remote_code": trust_remote_code,
            **{name: files.hub_kwargs[name] for name in SUBJECT_HUB_KWARGS},
        }
        base_kwargs = {name: value for name, value in base_kwargs.items() if value not in (None, False)}
        return cls._assembled(files, config, base_model, base_kwargs, verify_base)

    @classmethod
    def _assembled(
        cls,
        files: "ArtifactFiles",
        config: Any,
        base_model: PreTrainedModel | str | None,
        base_kwargs: dict[str, Any],
        verify_base: bool | None,
    ) -> Self:
        """The subject, held to the weights that the artifact records, with what the artifact holds laid over it."""
        tensors, provenance = files.tensors(), files.provenance()
        pinned = pinned_weights(files.path, provenance, verify_base)
        if pinned is not None:
            base_kwargs = base_kwargs | {PINNED: pinned}
        model = cls.from_artifact_config(config, base_model, base_kwargs)
        model.base_kwargs = base_kwargs
        model.load_trained_tensors(tensors)
        tokenizer = files.tokenizer(config)
        if tokenizer is not None:
            model.tokenizer = tokenizer
        model.provenance = provenance
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


class ArtifactFiles:
    """The files of an artifact in a folder or on the Hub, all of one commit, should the branch move meanwhile.

    Args:
        path: the folder or Hub id.
        hub_kwargs: `revision` and what else `transformers.utils.cached_file` takes.

    Raises:
        OSError: if there is no artifact, as `transformers` words it.
    """

    def __init__(self, path: str, **hub_kwargs: Any) -> None:
        self.path = path
        config_file = cast(str, cached_file(path, CONFIG_FILE, **hub_kwargs))
        self.hub_kwargs = hub_kwargs | {"revision": extract_commit_hash(config_file, None) or hub_kwargs["revision"]}

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name; see `read_tensors`."""
        return read_tensors(cast(str, cached_file(self.path, WEIGHTS_FILE, **self.hub_kwargs)))

    def provenance(self) -> dict[str, Any] | None:
        """See `read_provenance`."""
        return read_provenance(self._optional(PROVENANCE_FILE))

    def tokenizer(self, config: Any) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was saved with it, if any; `config` is the artifact's.

        Raises:
            ValueError: if its files are broken.
        """
        if self._optional("tokenizer_config.json") is None:
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, config=config, **self.hub_kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"artifact: the tokenizer in {self.path!r} is broken ({error}); fetch it anew") from error
        for name in ("is_local", "local_files_only"):  # where it was loaded from is no part of it
            tokenizer.init_kwargs.pop(name, None)
        return tokenizer

    def _optional(self, name: str) -> str | None:
        """A file's path, or None if the artifact has no such file."""
        return cached_file(self.path, name, _raise_exceptions_for_missing_entries=False, **self.hub_kwargs)


def read_tensors(file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: if it is broken.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"artifact: {file!r} holds no whole weights ({error}); it was cut off, or is a pointer of Git LFS: fetch "
            "it again, e.g. with consistency-lens pull"
        ) from error


def read_provenance(file: str | None) -> dict[str, Any] | None:
    """The content of an artifact's provenance.json; None if it has none.

    Raises:
        ValueError: if it is broken.
    """
    if file is None:
        return None
    try:
        provenance = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"artifact: {file!r} is broken ({error}); fetch it again, or remove it") from error
    if not isinstance(provenance, dict):
        raise ValueError(f"artifact: {file!r} holds no JSON object, but {type(provenance).__name__}; remove it")
    return provenance


def pinned_weights(path: str, provenance: dict[str, Any] | None, verify_base: bool | None) -> PinnedWeights | None:
    """What the subject's weights are compared with, for a `verify_base` as in `from_pretrained`; None: with nothing.

    Raises:
        ValueError: if they have to be compared, and the artifact at `path` does not say with what.
    """
    sha256 = recorded_weights_hash(provenance)
    if verify_base and sha256 is None:
        raise ValueError(f"verify_base: {path!r} records no hash of its subject's weights; leave out verify_base")
    return None if sha256 is None or verify_base is False else PinnedWeights(sha256, always=bool(verify_base))


def recorded_weights_hash(provenance: dict[str, Any] | None) -> str | None:
    """The hash of the subject's weights in the provenance of a lens or of a tuned lens; None if it has none."""
    provenance = provenance or {}
    cache = provenance.get("cache")
    found = (cache if isinstance(cache, dict) else provenance).get("weights_hash")
    return found if isinstance(found, str) else None
