"""Tiny tuned lenses that are better than the norm lens, solved in closed form, with all that a release needs."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hub_server import HubServer
from tiny_lenses import tiny_tokenizer
from tiny_models import random_tokens, tiny_model

from consistency_lens.data.activation_cache import file_hash
from consistency_lens.fingerprints import tokenizer_hash, weights_hash
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens

LICENSE_TEXT = "A licence of the makers of this model.\n"
ACCEPTANCE = {"gate_A": True, "gate_B": False, "gate_C": True, "gate_D": True}
KPIS = {
    "median_delta_kl_bits@{25,50,75}%": [0.31, 0.42, 0.53],
    "earliness_shift_first_rank_le_{10,5,1}": [1.0, None, 0.0],
    "last_layer_kl_after_temp_bits": 1e-7,
    "rank1_coverage_gain": 0.11,
    "share_of_prompts_with_shift_first_rank_le_{10,5}_at_least_{4,2}": [0.1, 0.2],
    "prompts": 20,
    "ci95": {
        "median_delta_kl_bits@{25,50,75}%": [[0.3, 0.32], [0.4, 0.44], [0.5, 0.56]],
        "earliness_shift_first_rank_le_{10,5,1}": [[0.0, 2.0], None, [0.0, 0.0]],
        "last_layer_kl_after_temp_bits": [0.0, 1e-6],
        "rank1_coverage_gain": [0.01, 0.2],
    },
}


class FittedLens(NamedTuple):
    """Where things lie."""

    path: Path
    """The lens's folder."""
    subject: Path


def save_subject(folder: Path, seed: int = 0, license: str | None = "apache-2.0") -> Path:
    """A tiny model with its tokenizer, its card and the text of its licence."""
    tiny_model("llama", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    head = f"license: {license}\n" if license else "tags: []\n"
    (folder / "README.md").write_text(f"---\n{head}---\n# A model\n")
    (folder / "LICENSE").write_text(LICENSE_TEXT)
    return folder


def add_subject(hub: HubServer, name: str, folder: Path) -> str:
    """Puts a model on the Hub; returns its commit."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return hub.add_repo("model", name, files).head.oid


def fit_lens(
    root: Path, name: str | None = None, commit: str | None = None, seed: int = 0, **changes: Any
) -> FittedLens:
    """A lens of the tiny model of `seed`, in `root/lens`; the model itself goes to `root/subject`.

    Args:
        name, commit: of the model on the Hub; by default it is that folder.
        changes: keys of the provenance.
    """
    subject, path = save_subject(root / "subject", seed), root / "lens"
    model = tiny_model("llama", seed=seed)
    model.config.name_or_path = name or str(subject)
    lens = TunedLens.for_model(model, tiny_tokenizer(), revision=commit)
    solve(lens)
    lens.save_pretrained(path)
    clean_name = (name or "subject").rpartition("/")[2]
    provenance = {
        "enabled": True, "model_id": name or str(subject), "clean_model_name": clean_name, "sha": None, "seed": 316,
        "dataset": {
            "repo_id": str(root / "texts.txt"), "name": None, "split": None, "revision": None,
            "sample_description": f"documents of {root}/texts.txt, packed to 64", "content_hash": "0" * 64,
        },
        "budget": {"tokens": 512, "seq_len": 64, "positions_per_seq": 8},
        "batching": {"micro_batch_seqs": 8, "grad_accum": 1, "effective_batch_seqs": 8},
        "capacity": {"rank_k": "full"}, "optim": None, "regularizers": None,
        "preconditioner": {"type": "none", "path": None},
        "val_kl_bits@{25,50,75}%": [0.4, 0.6, 0.5], "kpis": KPIS, "acceptance": ACCEPTANCE,
        "model_commit": commit, "tokenizer_commit": commit,
        "weights_hash": weights_hash(model), "tokenizer_hash": tokenizer_hash(tiny_tokenizer()),
        "tokens_consumed": {"ridge": 512, "training": 0, "validation": 64},
        "schedule": {"layers_per_step": 2, "positions_per_seq": 8, "steps_done": 7},
        "translator": {"rank": "full", "temperature": True, "parameters": 1, "place": "after_norm"},
        "sha256": {"model.safetensors": file_hash(path / "model.safetensors")},
        "versions": {"consistency_lens": "0.1.0"},
    } | changes  # fmt: skip
    (path / "provenance.json").write_text(json.dumps(provenance))
    (path / "metrics.json").write_text(json.dumps({"kl_from_final_bits": [0.4, 0.3, 0.0], "lens": str(path)}))
    return FittedLens(path, subject)


@torch.no_grad()
def solve(lens: TunedLens) -> None:
    """Least squares of the last layer's normalised residual on that of each other layer."""
    residuals = lens.residuals(*random_tokens(*[64] * 64, seed=3)).flatten(1, 2)
    hidden = [lens.readout.normalise(of).double() for of in residuals]
    ones = torch.ones(len(hidden[0]), 1, dtype=torch.float64)
    for layer, translator in enumerate(lens.translators):
        solved = torch.linalg.lstsq(torch.cat([hidden[layer], ones], dim=1), hidden[-1]).solution
        translator.W.copy_(solved[:-1] - torch.eye(len(solved) - 1))
        translator.c.copy_(solved[-1])
