"""What lies beside a saved lens, decoder or encoder and says how it came about: what its card is written from."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..configuration_consistency_lens import (
    ConsistencyLensConfig,
    LensCloneConfig,
    LensDecoderConfig,
    LensEncoderConfig,
)
from ..evaluation.samples import Sample
from ..lens_artifact import PROVENANCE_FILE
from .emissions import Emissions, read_emissions

# of a name, or behind "samples of "
LOCAL_PATH = re.compile(r"(?<![^ ])[/.~].*", re.DOTALL)
CONFIGS: dict[str, type[Any]] = {
    of.model_type: of for of in (ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig)
}


@dataclass(frozen=True)
class LensFolder:
    """The files of a lens's folder; what was never written is empty, and a card says so.

    Attributes:
        path: the folder.
        config: of the lens, the decoder or the encoder.
        with_code: whether it loads with `trust_remote_code=True` where this package is not installed.
        provenance: subject, data, versions.
        run: of the training: arguments, seconds, machine.
        metrics: of the last whole evaluation.
        samples: held-out rows in the lens's words.
        log: the training's, entry by entry.
        emissions: what the training cost.
    """

    path: Path
    config: ConsistencyLensConfig | LensDecoderConfig | LensEncoderConfig
    with_code: bool
    provenance: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]
    samples: list[Sample]
    log: list[dict[str, Any]]
    emissions: Emissions | None

    @property
    def clone(self) -> LensCloneConfig:
        """The configuration of the decoder, or of the encoder where that is alone."""
        return self.config.decoder if isinstance(self.config, ConsistencyLensConfig) else self.config

    @property
    def base(self) -> str:
        """The model that is read, by its Hub id, or as this card calls a local one."""
        return public(self.clone.base_model_name_or_path, self.clone.base_model_revision)

    @property
    def base_revision(self) -> str | None:
        """The commit of the base on the Hub; None for a model that is local."""
        return self.clone.base_model_revision

    @property
    def data(self) -> dict[str, Any]:
        """The provenance of the activations that were trained on."""
        return self.provenance.get("cache", {})

    @property
    def recipe(self) -> dict[str, Any]:
        return self.provenance.get("recipe") or self.run.get("recipe", {})


def read_lens_folder(path: str | Path) -> LensFolder:
    """Reads what lies in a folder.

    Raises:
        ValueError: if it holds no lens, decoder or encoder, or a file in it cannot be read.
    """
    path = Path(path)
    config = _json(path / "config.json", None)
    kind = (config or {}).get("model_type")
    if kind not in CONFIGS:
        found = "no config.json" if config is None else f"a model of type {kind!r}"
        raise ValueError(f"card: {str(path)!r} has {found}; pass the folder of a lens, decoder or encoder")
    return LensFolder(
        path=path,
        config=CONFIGS[kind].from_dict(config),
        with_code="auto_map" in (config or {}),
        provenance=_json(path / PROVENANCE_FILE, {}),
        run=_json(path / "run.json", {}),
        metrics=_json(path / "metrics.json", {}),
        samples=_samples(path / "samples.jsonl"),
        log=_json(path / "log_history.json", []),
        emissions=read_emissions(path),
    )


def public(name: str, revision: str | None) -> str:
    """A name as others may read it: a Hub id, which has a revision, as it is; of a path from elsewhere the last part.

    A path that holds from where a command is started, such as `examples/tiny_stories`, stays.
    """
    return name if revision is not None else LOCAL_PATH.sub(lambda path: Path(path[0]).name or path[0], name)


def _json(file: Path, missing: Any) -> Any:
    if not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"card: {str(file)!r} is no JSON ({error}); write it again") from error


def _samples(file: Path) -> list[Sample]:
    if not file.is_file():
        return []
    names = {item.name for item in fields(Sample)}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [Sample(**{name: row[name] for name in names}) for row in rows]
