"""Runs of a tiny trainer under several strategies, one after the other, on two processes.

Each leaves FOLDER/<name>/log.json and model.safetensors, and FOLDER/<name>.<rank>.json, its sizes, of every process.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lens_runs import tiny_trainer
from safetensors.torch import save_file
from sharded_on_cpu import pretend_gpus, use
from test_controlled_trainer import FULL, KeepTensors, late_groups
from test_trainer import LORA, KeepGradients
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.evaluation.arguments import EvaluationArguments
from consistency_lens.evaluation.evaluator import Evaluator
from consistency_lens.training.evaluation_callback import EvaluateLens
from consistency_lens.training.sample_tables import SampleTables
from consistency_lens.training.trainer import ConsistencyLensTrainer

GLOBAL_BATCH = 8
STAGES = {
    "max_steps": 12,
    "stages": ["warm_start 4s", "gumbel 4s", "policy_gradient"],
    "own_share": 0.25,
    "delta_residual": "full",
    "encoder_learning_rate": 3e-3,
    "max_grad_norm": 1.0,
}


@dataclass
class Run:
    """One run.

    Attributes:
        name: of its folder.
        strategy: see `sharded_on_cpu.use`.
        clones: settings of the lens.
        arguments: of the training, over `STAGES`.
        source: of the activations.
        watched: whether held-out rows are evaluated and shown meanwhile.
        poisoned_step: the step whose gradients are NaN, from the last process.
        resumed: name of another run and one of its checkpoints, to go on from.
    """

    name: str
    strategy: str
    clones: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    source: str = "cache"
    watched: bool = False
    poisoned_step: int | None = None
    resumed: tuple[str, str] | None = None


class PoisonStep(TrainerCallback):
    """Makes one step's loss NaN on one process, and keeps the trained tensors behind each step."""

    def __init__(self, trainer: ConsistencyLensTrainer, number: int | None) -> None:
        self.trainer = trainer
        self.number = number
        self.tensors: list[dict[str, torch.Tensor]] = []
        if trainer.args.process_index == trainer.args.world_size - 1:
            trainer.lens.encoder.output_map.register_forward_hook(self.poison)

    def poison(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if self.trainer.state.global_step == self.number else output

    def on_step_end(self, args, state, control, **kwargs):
        tensors = self.trainer.weights.gather(self.trainer.lens, keep=True)
        self.tensors.append({name: tensor.clone() for name, tensor in tensors.items()})


def numel(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter between two steps."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def sizes(trainer: ConsistencyLensTrainer) -> dict[str, int]:
    """Elements that this process holds: of the lens, the subject, the LM reference and the optimizer's moments."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    trainer.weights.gather(trainer.lens, keep=False)  # FSDP2 lets go of what a look at the lens has left gathered
    models = {"lens": trainer.lens, "subject": trainer.lens.subject.model}
    if trainer._reference is not None:
        models["reference"] = trainer._reference
    moments = [local(state["exp_avg"]) for state in optimizer.state.values()]
    left_whole = [p for p in trainer.lens.parameters() if hasattr(p, "ds_tensor") and p.numel() > 0]
    return {
        **{name: numel(local(parameter) for parameter in model.parameters()) for name, model in models.items()},
        "moments": numel(moments),
        "left_whole": numel(left_whole),
    }


def run_one(run: Run, folder: Path, rank: int, world: int) -> None:
    settings = use(run.strategy, folder) | {"per_device_train_batch_size": GLOBAL_BATCH // world}
    settings |= STAGES | {"output_dir": str(folder / run.name)} | run.arguments
    trainer = tiny_trainer(folder / f"{run.name}.{rank}", run.clones, run.source, **settings)
    trainer.remove_callback(PrinterCallback)
    if run.watched:
        rows: Any = trainer.eval_dataset
        collator: Any = trainer.data_collator
        arguments = EvaluationArguments(rows=8, controls=["mean", "shuffled"], disable_tqdm=True)
        trainer.callback_handler.callbacks.insert(
            0, EvaluateLens(trainer, Evaluator(trainer.lens, rows, collator, arguments))
        )
        trainer.add_callback(SampleTables(trainer, rows, 6, 4))
        assert isinstance(rows, ActivationRows)
    poison = PoisonStep(trainer, run.poisoned_step)
    if run.poisoned_step is not None:
        trainer.add_callback(poison)
    trainer.train(resume_from_checkpoint=str(folder.joinpath(*run.resumed)) if run.resumed else None)
    (folder / f"{run.name}.{rank}.json").write_text(json.dumps(sizes(trainer)))
    trainer.save_model()
    if rank == 0:
        moved = [
            max(float((after[name] - before[name]).abs().max()) for name in after)
            for before, after in zip(poison.tensors, poison.tensors[1:], strict=False)
        ]
        (folder / run.name / "log.json").write_text(json.dumps({"log": trainer.state.log_history, "moved": moved}))


def run_all(folder: str, job: str) -> None:
    """Does the runs of a JSON list, on each of the processes that call it."""
    pretend_gpus()
    for run in json.loads(job):
        run_one(Run(**run), Path(folder), torch.distributed.get_rank(), torch.distributed.get_world_size())


ONE_STAGE = {
    "warm_start": ("warm_start", {"shorter_share": 0.5}),
    "gumbel": ("gumbel", {}),
    "policy": ("policy_gradient", {}),
    "policy_options": (
        "policy_gradient",
        {"prefix_budgets": True, "straight_through": True, "lm_estimator": "k3", "reward": "-kl"},
    ),
}


def keep_gradients(folder: Path) -> None:
    """Saves the gradients of every trained tensor in two steps of each stage, as <stage><processes>.safetensors."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    for name, (stage, settings) in ONE_STAGE.items():
        trainer = tiny_trainer(
            folder / f"{name}{size}-rank{rank}", max_steps=2, per_device_train_batch_size=GLOBAL_BATCH // size,
            stages=[stage], lm_reference="subject", max_grad_norm=0.0, own_share=0.5, optim="sgd", learning_rate=0.01,
            **settings,
        )  # fmt: skip
        kept = KeepGradients()
        trainer.add_callback(kept)
        trainer.train()
        if rank == "0":
            tensors = {
                f"{i}.{n.removeprefix('module.')}": g for i, step in enumerate(kept.steps) for n, g in step.items()
            }
            save_file(tensors, folder / f"{name}{size}.safetensors")


def keep_controlled(folder: Path) -> None:
    """Saves what the trained tensors were after every step of runs with late groups: <kind><processes>.safetensors."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    for clones in (FULL, LORA):
        settings = late_groups(clones)[1] | {"gradient_accumulation_steps": 2, "ema_decay": 0.5, "optim": "sgd"}
        settings |= {"per_device_train_batch_size": 4 // size, "group_max_grad_norm": ["projections 0.05"]}
        own = folder / f"{clones['training']}{size}-rank{rank}"
        trainer = tiny_trainer(own, clones, **(settings | {"learning_rate": 0.1, "max_grad_norm": 0.2}))
        kept = KeepTensors(trainer)
        trainer.train()
        if rank == "0":
            kept.steps.append(kept.tensors())  # the averages
            tensors = {f"{i}.{n}": t for i, step in enumerate(kept.steps) for n, t in step.items()}
            save_file(tensors, folder / f"{clones['training']}{size}.safetensors")


def run_everything(folder: str, job: str) -> None:
    """All that the default tests of two processes look at."""
    keep_gradients(Path(folder))
    keep_controlled(Path(folder))
    run_all(folder, job)
