"""The peer's side of `tuned_lens_vs_peer.py`: tuned-lens 0.2.0 fits a lens by its own loop, in its own venv.

`Train.execute` is the peer's code as it is published, and so are the lens, the loss (KL(P_final || P_layer) with the
lens in bfloat16 autocast), the clipping, the optimizer (SGD with Nesterov momentum 0.9, learning rate 1.0 x (1 - 0.9),
weight decay 1e-3) and the schedule (linear to zero). Only `setup` and `_log` are ours: the model comes without the
arguments that the transformers of today refuses, the tokens come from a file, and the clock is read.

Two changes are in the peer's favour. It would also train a translator of the embeddings, which no other lens here has;
it is spared that, and so trains the same layers as ours. With `--autocast false` it computes in float32 throughout: a
CPU without instructions for bfloat16 takes many times as long for its autocast.

Writes config.json and params.pt as the peer does, into `--output`, and `result.json`: seconds of the loop alone, the
memory it took, and its curve. `--snapshots` keeps params.pt of as many equal parts of the run, in `step-<n>/`; the
time to write them is not counted.
"""

import argparse
import json
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fit_memory import FitMemory
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from tuned_lens import TunedLens
from tuned_lens.scripts import ingredients
from tuned_lens.scripts.train_loop import State, Train


class WithoutEmbeddings(nn.Module):
    """A model whose `hidden_states` begin with the output of its first block."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.hidden_states = output.hidden_states[1:]
        return output


class TimedTrain(Train):
    """The peer's training, on a model and tokens that are here already, with a clock."""

    subject: PreTrainedModel
    blocks: torch.Tensor
    snapshots: int = 0

    def setup(self) -> tuple[State, nn.Module, int]:
        self.lens = TunedLens.from_model(self.subject)
        accumulation = self.calculate_gradient_accumulation_steps(self.blocks.shape[1])
        optimizer = self.opt.create_optim([p for p in self.lens.parameters() if p.requires_grad])
        batches = [{"input_ids": rows} for rows in self.blocks.split(self.dist.per_gpu_batch_size)]
        state = State(
            dataloader=batches,
            lens=self.lens,
            opt=optimizer,
            scheduler=self.opt.create_scheduler(optimizer, self.num_steps),
            wandb_id=None,
            nats_to_bpb=1.0,
        )
        self.curve: list[dict[str, Any]] = []
        self.memory = FitMemory()
        self.paused, self.start = 0.0, time.perf_counter()
        return state, WithoutEmbeddings(self.subject), accumulation

    def _log(self, opt: Any, step: int, losses: dict[str, list[float]], *_rest: Any) -> None:
        now = time.perf_counter()
        seconds = now - self.start - self.paused
        kl = float(np.mean([np.mean(values) for values in losses.values()]))
        self.curve.append({"step": step + 1, "seconds": seconds, "training_kl": kl})
        if self.snapshots and (step + 1) % max(1, self.num_steps // self.snapshots) == 0:
            save(self.lens, self.output / f"step-{step + 1}")
        self.paused += time.perf_counter() - now


def save(lens: TunedLens, folder: Path) -> None:
    """Saves a lens as the peer does, each translator under the hidden state that it reads, the embeddings' being 0.

    In training, translator k reads the output of block k (`WithoutEmbeddings`), and the last one reads nothing.
    """
    lens = deepcopy(lens)
    translators = list(lens.layer_translators)
    lens.layer_translators = nn.ModuleList([translators[-1], *translators[:-1]])
    lens.save(folder)


def main() -> None:
    """Fits one lens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", required=True, help="token blocks (N, S), .npy")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--tokens_per_step", required=True, type=int)
    parser.add_argument("--rows_per_pass", required=True, type=int)
    parser.add_argument("--lr_scale", default=1.0, type=float)
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adam"))
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--autocast", default="true", choices=("true", "false"))
    parser.add_argument("--snapshots", default=0, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    blocks = torch.from_numpy(np.load(options.blocks)).long()
    train = TimedTrain(
        model=ingredients.Model(options.model),
        data=ingredients.Data(),
        opt=ingredients.Optimizer(
            optimizer=ingredients.OptimizerOption(options.optimizer), lr_scale=options.lr_scale, zero=False
        ),
        dist=ingredients.Distributed(per_gpu_batch_size=options.rows_per_pass, fsdp=False, cpu_offload=False),
        output=options.output,
        num_steps=blocks.numel() // options.tokens_per_step,
        tokens_per_step=options.tokens_per_step,
        lens_name_or_path=None,
        bias_only=False,
    )
    train.subject = AutoModelForCausalLM.from_pretrained(options.model).eval().requires_grad_(False)
    train.blocks, train.snapshots = blocks, options.snapshots
    autocast = partial(torch.autocast, enabled=options.autocast == "true")
    with mock.patch.object(torch, "autocast", autocast):
        train.execute()
    memory = train.memory.as_dict()
    save(train.lens, options.output)
    result = {
        "seconds": train.curve[-1]["seconds"],
        "tokens": train.num_steps * options.tokens_per_step,
        "steps": train.num_steps,
        "memory": memory,
        "curve": train.curve,
    }
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"{result['seconds']:.1f} s, {memory['rise_bytes'] / 2**20:.0f} MiB\n")


if __name__ == "__main__":
    main()
