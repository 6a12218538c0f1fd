"""What decoder and encoder share: clones of the subject that copy no frozen weights, artifacts of trained tensors.

An artifact holds the tensors that were trained and nothing else: `from_pretrained` takes the subject at its pinned
revision (or rebuilds its architecture, where the whole clone was trained) and lays the trained tensors over it.
"""

import copy
import json
import os
from itertools import chain
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
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
from .optional_packages import require
from .straight_through import straight_through_embedding

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


def clone_subject(model: PreTrainedModel, share_weights: bool) -> PreTrainedModel:
    """A second module tree of `model`: over the same tensors (`share_weights`), or over copies of them.

    Sharing puts every parameter and buffer into the memo of `copy.deepcopy`, so only the Python objects are new
    (one copy of frozen weights, however many clones). Copies are float32, for they will be trained: an optimizer's
    small updates are rounded away in bfloat16.
    """
    if not share_weights:
        return copy.deepcopy(model).float()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Switches dropout off for good, in place: in train mode too, a text must depend on the activation alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # OPT, Bloom and many others keep the rate as a number on the module; Falcon reads it from the config at each pass.
    for holder in (*model.modules(), model.config.get_text_config()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)
    return model


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


def encode_prompt(prompt: str, slot: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids before and after the slot of a prompt; the prefix starts with BOS where the tokenizer has one.

    Raises:
        ValueError: if the prompt does not hold its slot exactly once.
    """
    if prompt.count(slot) != 1:
        raise ValueError(f"prompt: must hold the slot {slot} exactly once, got {prompt!r}; for example '{slot}'")
    before, after = prompt.split(slot)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after)]
    return bos + parts[0], parts[1]


class Normaliser(nn.Module):
    """Centres activations on the training mean and divides by the training RMS, and back.

    Buffers: `mean` (d,), `rms` (), both of the training cache. A normalised activation has mean square 1, so its mean
    squared error is 1 - FVE in expectation.
    """

    mean: Tensor
    rms: Tensor

    def __init__(self, width: int, device: torch.device | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, device=device))
        self.register_buffer("rms", torch.ones((), device=device))

    def normalise(self, activations: Tensor) -> Tensor:
        """(A - mean) / rms, (..., d), float32."""
        return (activations.float() - self.mean) / self.rms

    def denormalise(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`, (..., d), float32."""
        return normalised.float() * self.rms + self.mean


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
        base_kwargs = {"dtype": config.base_config.get("dtype") or "auto", **base_kwargs}
        revision = None if base_model else config.base_model_revision
        try:
            subject = AutoModelForCausalLM.from_pretrained(name, revision=revision, **base_kwargs).eval()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"subject: no model at {name!r} (revision {revision}); pass base_model=<path, Hub id or model> "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
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


def add_adapter(model: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Adds a LoRA adapter (Hu et al. 2021, arXiv:2106.09685) to `model`, in place; all else in it is frozen.

    Raises:
        ValueError: if PEFT is missing or refuses the settings, or if they would train more than low-rank matrices of
            blocks and head: the clone's own tensors are shared with the subject, which must not move.
    """
    peft = require("peft", extra="lora", needed_for="training='lora'")
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**lora), model, adapter_name="lens")
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: PEFT refuses {lora}: {error}") from error
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Embeddings are read by table row on the soft path, past any adapter of the layer.
    outside = [name for name in trained if ".lora_" not in name or ".lora_embedding_" in name]
    if outside:
        raise ValueError(
            f"lora: these settings train {outside[0]}, which is no low-rank matrix of a block; leave out `bias`, "
            "`modules_to_save` and embeddings, or use training='full'"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bfloat16, an optimizer's small updates would be rounded away
            parameter.data = parameter.data.float()


class LensClone(TrainedTensorsModel):
    """A clone of the subject with a prompt, projections and statistics around it; parent of decoder and encoder."""

    base: PreTrainedModel
    embedding_scale: float
    prefix_embeddings: nn.Parameter | None
    suffix_embeddings: nn.Parameter | None

    def __init__(self, config: Any, base: PreTrainedModel):
        super().__init__(config)
        self.base = without_dropout(base)
        if config.training == "lora":
            add_adapter(self.base, config.lora)
        elif config.training == "full":
            self.base.requires_grad_(True)
        else:
            self.base.requires_grad_(False)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The base's own table; its rows, times `embedding_scale`, are what the layer gives."""
        return cast(nn.Embedding, self.base.get_input_embeddings())

    def is_trained_name(self, name: str) -> bool:
        """Whether a tensor of this clone belongs into its artifact."""
        return not name.startswith("base.") or self.config.training == "full" or ".lora_" in name

    def trained_tensors(self) -> dict[str, Tensor]:
        seen: set[int] = set()
        tensors: dict[str, Tensor] = {}
        own_buffers = (item for item in self.named_buffers() if not item[0].startswith("base."))
        for name, tensor in chain(self.named_parameters(remove_duplicate=False), own_buffers):
            if self.is_trained_name(name) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor
        return tensors

    def add_prompt_parameters(self) -> None:
        """Makes the prompt's embeddings parameters (P, d), started from those of its tokens."""
        for side, token_ids in (("prefix", self.config.prefix_ids), ("suffix", self.config.suffix_ids)):
            trainable = self.config.trainable_prompt and len(token_ids) > 0  # an empty parameter could never move
            rows = (
                nn.Parameter(lookup(self.token_embedding, token_ids).detach().float().clone()) if trainable else None
            )
            self.register_parameter(f"{side}_embeddings", rows)

    def prompt(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompt before and after its slot, (P, d) and (Q, d)."""
        prefix, suffix = self.prefix_embeddings, self.suffix_embeddings
        return (
            lookup(self.token_embedding, self.config.prefix_ids) if prefix is None else prefix,
            lookup(self.token_embedding, self.config.suffix_ids) if suffix is None else suffix,
        )


def lookup(embedding: nn.Embedding, token_ids: list[int]) -> Tensor:
    """Embeddings (P, d) of a list of token ids, through the layer itself, so that its own scaling applies once."""
    return embedding(torch.tensor(token_ids, dtype=torch.long, device=embedding.weight.device))


def embed_sampled(clone: LensClone, logits: Tensor, ids: Tensor, keys: Tensor | None, tau: float) -> Tensor:
    """Embeddings (N, d) of sampled tokens in a clone's table, straight-through where gradients are wanted."""
    embedding = clone.token_embedding
    if not torch.is_grad_enabled():
        return embedding(ids)
    return straight_through_embedding(logits, ids, keys, embedding.weight, tau) * clone.embedding_scale
