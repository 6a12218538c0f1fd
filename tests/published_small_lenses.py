"""Lenses of a few kilobytes to publish: whole to every check that needs no model, and quick, for no model is built."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from consistency_lens.configuration_consistency_lens import ConsistencyLensConfig, LensDecoderConfig

COMMIT = "c" * 40
METRICS = {
    "fve": 0.5, "fve_nrm": 0.45, "cosine": 0.8, "kl": 0.7, "kl_recovered": 0.6, "rows": 32, "documents": 8,
    "controls": {"shuffled": {"fve": -0.4, "kl_recovered": -0.1}}, "ci95": {"fve": [0.4, 0.6]},
}  # fmt: skip


def write_lens(
    folder: Path, kind: str = "lens", base: str = "org/base", revision: str | None = COMMIT, **provenance: Any
) -> Path:
    """A lens (or `decoder`) of layer 3 with T = 4, whose weights nobody could use."""
    clone = {"base_model_name_or_path": base, "base_model_revision": revision, "layer": 3, "num_text_tokens": 4}
    config = LensDecoderConfig(**clone) if kind == "decoder" else ConsistencyLensConfig(clone, clone)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file({"projection": torch.arange(64, dtype=torch.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"/a/path/like/token": 1}}}')
    (folder / "README.md").write_text("# of the training\n")
    content = {"cache": {"weights_hash": "a" * 64, "layer": 3}, "seed": 7} | provenance
    (folder / "provenance.json").write_text(json.dumps(content))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return folder


def change(folder: Path, name: str, **keys: Any) -> None:
    """Changes keys of a JSON file."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
