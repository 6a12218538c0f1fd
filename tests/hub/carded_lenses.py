"""Folders of tiny lenses with all that a training leaves beside them, for their cards."""

import json
from pathlib import Path
from typing import Any

from consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig
from consistency_lens.evaluation.controls import CONTROLS
from consistency_lens.evaluation.report import METRICS

EMBED, TEXT = {"prompt": "Words: <embed>", "injection_layers": 2}, {"prompt": "<text>"}
DATASET, DATASET_COMMIT = "org/stories", "d" * 40
METRICS_FILE = {
    **{name: 0.125 + 0.05 * number for number, name in enumerate(METRICS)},
    "rows": 1024,
    "documents": 99,
    "controls": {name: {"fve": -0.01 * number, "kl_recovered": 0.02 * number} for number, name in enumerate(CONTROLS)},
    "ci95": {"fve": [0.1, 0.15], "kl_recovered": [0.3, 0.35], "controls.mean.fve": [0.0, 0.0]},
}
SAMPLE = {
    "document": 1, "position": 3, "context": "w3 w4 «w5»", "explanation": " w4 w5", "true_tail": "w4 w5",
    "continuation": "w6", "fve": 0.5, "kl": 0.25, "top_before": [["w6", 0.75]], "top_after": [["w7", 0.5]],
}  # fmt: skip
RUN = {
    "seconds": 400.0,
    "laps": {"corpus_and_cache": 60.0, "training": 300.0, "evaluation": 40.0},
    "machine": {"cpu_cores": 4, "threads": 2, "device": "cpu", "processes": 1},
    "steps": 2150,
    "rows_per_step": 64,
    "non_default": {"layer": 1, "dataset": "/home/me/texts.txt", "stages": ["warm_start 60%", "policy_gradient"]},
    "training": {
        "stages": ["warm_start 60%", "policy_gradient"],
        "learning_rate_schedule": ["cosine 1 -> 0.1", "linear 1 -> 0"],
        "lr_scheduler_type": "linear",
        "learning_rate": 2e-3,
        "encoder_learning_rate": 3e-3,
        "optim": "adamw_torch",
        **{f"{term}_weight": ["1"] for term in ("ce", "mse", "kl", "policy")},
        "lm_weight": ["0.2"],
        "entropy_weight": ["0"],
    },
}
PROVENANCE = {
    "seed": 3,
    "train_rows": 4321,
    "validation_rows": 456,
    "trained_parameters": 12345,
    "cache": {
        "weights_hash": "a" * 64,
        "dataset": DATASET,
        "dataset_revision": DATASET_COMMIT,
        "positions": {"rule": "uniform in [min_position, length - 2]", "per_sequence": 8, "min_position": 1},
    },
    "base_license": {"name": "apache-2.0", "title": None, "link": None},
    "versions": {"python": "3.11.7", "consistency_lens": "0.1.0", "torch": "2.13.0"},
    "git_commit": "c" * 40,
}
LOG = [
    {"step": step, "stage": 1 + (step > 500), "loss": 2.0 / step, "mse": 1.0 / step, "seconds": 1.0}
    for step in range(50, 1050, 50)
] + [{"step": 1000, "eval_fve": 0.3, "eval_kl_recovered": 0.4}, {"step": 1000, "train_runtime": 9.0}]
EMISSIONS = (
    "run_id,emissions,energy_consumed,country_name,gpu_model,cpu_model\n"
    "one,0.001,0.01,Norway,,A CPU\none,0.002,0.02,Norway,,A CPU\ntwo,0.003,0.03,Norway,,A CPU\n"
)


def save_config(
    folder: Path, base: str = "org/model", commit: str | None = "b" * 40, kind: str = "lens", training: str = "full"
) -> Path:
    """config.json of a lens, a decoder or an encoder of a base model, at its commit if that is on the Hub."""
    clone = {
        "base_model_name_or_path": base,
        "base_model_revision": commit,
        "base_config": {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 32},
        "layer": 1,
        "num_text_tokens": 4,
        "training": training,
        "lora": {"r": 2} if training == "lora" else None,
    }
    configs = {
        "lens": lambda: ConsistencyLensConfig(decoder=clone | EMBED, encoder=clone | TEXT),
        "decoder": lambda: LensDecoderConfig(**clone, **EMBED),
        "encoder": lambda: LensEncoderConfig(**clone, **TEXT),
    }
    configs[kind]().save_pretrained(folder)
    return folder


def write_files(folder: Path, **changes: Any) -> Path:
    """All files beside the weights; a change replaces keys of one, and None leaves it out.

    Args:
        changes: `metrics, run, provenance, samples, log`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"metrics": METRICS_FILE, "run": RUN, "provenance": PROVENANCE}
    for name, content in files.items():
        change = changes.get(name, {})
        if change is not None:
            (folder / f"{name}.json").write_text(json.dumps(content | change))
    samples = changes.get("samples", [SAMPLE])
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "log_history.json").write_text(json.dumps(changes.get("log", LOG)))
    return folder
