"""Trains and reads tiny lenses, here or in a process of its own on the device of `pretend_device`.

Run with `python pretended_runs.py FOLDER`: it prints what `everything` gives there, as JSON.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lens_runs import tiny_trainer

from consistency_lens import adapters, lens_decoder, rounded_weights
from consistency_lens.evaluation import CHECKS, EvaluationArguments, Evaluator
from consistency_lens.training.trainer import ConsistencyLensTrainer

LORA = {"training": "lora", "lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}}
ON_THE_FLY = {"source": "on_the_fly", "delta_residual": "full"}
CASES: dict[str, dict[str, Any]] = {
    "both stages": {},
    "policy gradient": {"stages": ["policy_gradient"], "max_steps": 2},
    "chunks": {"stages": ["gumbel"], "logits_chunk_size": 8, "delta_residual": "detached", "max_steps": 2},
    "adapters, on the fly": {"lens_settings": LORA, "stages": ["gumbel"], "max_steps": 2, **ON_THE_FLY},
    "checkpoints": {"stages": ["gumbel"], "activation_checkpointing": True, "max_steps": 2},
    "bfloat16": {"lens_settings": LORA, "stages": ["gumbel"], "bf16": True, "max_steps": 2},
}


def everything(folder: Path, **settings: Any) -> dict[str, Any]:
    """The losses of each case, and what the lens of the first says and is worth."""
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        trainer = tiny_trainer(folder / name, **({"lm_reference": "subject"} | case | settings))
        trainer.train()
        results[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not case:
            results |= reading(trainer)
    return results


def reading(trainer: ConsistencyLensTrainer) -> dict[str, Any]:
    """Where the lens is, an explanation, and the figures of every check that needs no other rows."""
    lens, rows = trainer.lens.eval(), trainer.eval_dataset
    checks = [name for name in CHECKS if name not in ("linear_probe", "private_code")]
    arguments = EvaluationArguments(rows=12, checks=checks, check_rows=4, best_of=2, disable_tqdm=True)
    figures = Evaluator(lens, rows, trainer.data_collator, arguments)()
    return {
        "device": lens.device.type,
        "explanation": str(lens.explain("w3 w4 w5 w6 w7")),
        "figures": {name: figures[name] for name in ("fve", "kl_recovered", "best_of_n", "steering", "controls")},
    }


def main() -> None:
    """Everything on the pretended device, as if it were the machine's."""
    from pretend_device import DEVICE, PretendDevice

    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)  # which transformers reads
    with (
        mock.patch("accelerate.state.PartialState.default_device", DEVICE),
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True),
        # its tensors are of a kind of their own, but ordinary all the same
        mock.patch.object(adapters, "is_whole", lambda weight: weight.ndim == 2),
        mock.patch.object(rounded_weights, "is_whole", lambda weight: weight.ndim == 2),
        mock.patch.object(lens_decoder, "can_be_summed", lambda weight: weight.requires_grad),
        PretendDevice(),
    ):
        assert torch.zeros(1, device=DEVICE).device == DEVICE
        print(json.dumps(everything(Path(sys.argv[1]), use_cpu=False)))


if __name__ == "__main__":
    main()
