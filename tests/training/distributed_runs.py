"""Runs of a tiny trainer under several strategies, one after the other; started on two processes by torchrun.

`python -m torch.distributed.run --nproc_per_node 2 distributed_runs.py FOLDER JOB` where JOB is a JSON list of runs
(see `Run`). Each leaves FOLDER/<name>/log.json and model.safetensors, and sizes.<rank>.json of every process.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from lens_runs import tiny_trainer
from sharded_on_cpu import pretend_gpus, use
from transformers import PrinterCallback, TrainerCallback

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.evaluation.arguments import EvaluationArguments
from consistency_lens.evaluation.evaluator import Evaluator
from consistency_lens.training.evaluation_callback import EvaluateLens
from consistency_lens.training.sample_tables import SampleTables
from consistency_lens.training.trainer import ConsistencyLensTrainer

GLOBAL_BATCH = 8
STAGES = {
    "max_steps": 20,
    "stages": ["warm_start 6s", "gumbel 7s", "policy_gradient"],
    "own_share": 0.25,
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
        trainer.add_callback(SampleTables(trainer, rows, 10, 4))
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


def main() -> None:
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    pretend_gpus()
    torch.distributed.init_process_group("gloo")
    for run in job:
        run_one(Run(**run), folder, torch.distributed.get_rank(), torch.distributed.get_world_size())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
