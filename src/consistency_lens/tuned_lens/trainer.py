"""The KL steps of a tuned lens: `TunedLensTrainer`, a transformers `Trainer` whose checkpoints are whole."""

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

from ..atomic_write import write_json
from ..checkpoints import states
from ..checkpoints.resuming import PROGRESS_FILE
from ..checkpoints.trainer import WholeCheckpointTrainer
from .depth import DEPTHS, layer_at_depth
from .fit_arguments import TunedLensTrainingArguments
from .held_out import BITS, HeldOutKL, held_out_kl
from .modeling_tuned_lens import TunedLens
from .optimizer import make_optimizer
from .passes import PassCache, PassDataset
from .progress import FitProgress, told
from .residual_batches import (
    ResidualBatch,
    make_head,
    position_bounds,
    read_batch,
    sampled_positions,
    vocabulary_budget,
)
from .streamed_kl import Head, Teacher, read_teacher, top_tokens

logger = logging.getLogger(__name__)

# the fourth of the numbers that a draw of layers is made from; those of positions have three
LAYER_DRAWS = 1


class TunedLensTrainer(WholeCheckpointTrainer):
    """Minimises KL(P_final || P_layer) of all or some layers, at sampled positions, with the subject frozen.

    Each pass of the subject serves one step or several (see `passes`), and its head is read at the sampled positions
    alone. What is kept in the end is the best of what was read on held-out text: at the start, every `eval_steps`, and
    after the last step.

    Args:
        lens: with its subject; it goes where the fit runs, the subject is there already.
        args: see there.
        train_blocks: tokens, (N, S).
        validation_blocks: of other documents, (M, S).
        first_row: number of the first training block, for the draws.

    Attributes:
        tokens: that went through the subject in training so far, of all processes.
        num_layers, num_positions: of a pass, and of each of its sequences.
        steps_per_pass: optimizer steps that its positions are shared out to.
    """

    args: TunedLensTrainingArguments
    loss_is_scaled_for_ga = False  # the loss is a mean, which accumulation has to divide
    how_to_go_on = "give the same command again"

    def __init__(
        self,
        lens: TunedLens,
        args: TunedLensTrainingArguments,
        train_blocks: np.ndarray,
        validation_blocks: np.ndarray,
        first_row: int = 0,
    ) -> None:
        self.lens = lens
        self.validation_blocks = validation_blocks
        self.head = make_head(lens, args.head_dtype)
        self.bounds = position_bounds(args.position_range, train_blocks.shape[1])
        automatic = vocabulary_budget(lens.config.vocab_size, lens.num_layers)
        self.num_layers = args.count_of("layers_per_step", automatic.layers, lens.num_layers - 1)
        self.num_positions = args.count_of(
            "positions_per_sequence", automatic.positions, self.bounds[1] - self.bounds[0]
        )
        pool = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.steps_per_pass = max(1, min(self.num_positions, pool * self.num_positions // args.rows_per_step))
        if args.world_size > 1:
            # a short last pool would be filled up with blocks of the first one, and its processes would part ways
            train_blocks = train_blocks[: len(train_blocks) // pool * pool]
            if not len(train_blocks):
                raise ValueError(f"tokens: less than the {pool} sequences of one pass of all processes; raise tokens")
        self.cache = PassCache()
        self.tokens = 0
        self._kl, self._passes = torch.zeros(()), 0  # since the last log
        callbacks: list[TrainerCallback] = []
        if args.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        super().__init__(
            model=lens,
            args=args,
            train_dataset=PassDataset(train_blocks, pool, self.steps_per_pass, args.seed, first_row),
            eval_dataset=PassDataset(validation_blocks, 1, 1, args.seed),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(FitProgress)

    # --- the loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def layers_of(self, epoch: int, pool: int) -> list[int]:
        """The layers that a pool trains, ascending: by seed, epoch and pool alone, so every process draws the same."""
        available = self.lens.num_layers - 1
        if self.num_layers == available:
            return list(range(available))
        draws = np.random.default_rng([self.args.seed, epoch, pool, LAYER_DRAWS])
        return sorted(draws.choice(available, self.num_layers, replace=False).tolist())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean KL over layers and positions, and the two penalties."""
        epoch, pool = int(self.state.epoch or 0), int(inputs["pool"][0])
        layers = self.layers_of(epoch, pool)
        rows, parts = inputs["row"].tolist(), inputs["part"].tolist()

        def read(places: list[int]) -> ResidualBatch:
            chosen = [rows[place] for place in places]
            positions = sampled_positions(chosen, self.num_positions, self.bounds, self.args.seed, epoch)
            return read_batch(self.lens, self.head, inputs["input_ids"][places], positions, layers)

        batch = self.cache.take((epoch, pool), rows, parts, self.steps_per_pass, read)
        # counted at the first part, for a fit that goes on in the middle of a pool reads its blocks again
        self.tokens += parts.count(0) * inputs["input_ids"].shape[1] * self.args.world_size
        teacher, head = self.narrowed(batch.teacher)
        output = model(batch.hidden, layers, teacher, head)
        kl = output.kl.mean()
        self._kl, self._passes = self._kl.to(kl) + kl.detach(), self._passes + 1
        loss = kl + self.args.smallness * output.smallness + self.args.smoothness * output.roughness
        return loss.to(self.args.device)  # the subject's head may lie elsewhere

    def narrowed(self, teacher: Teacher) -> tuple[Teacher, Head]:
        """Teacher and head on the teacher's most probable tokens alone, if asked for."""
        if self.args.teacher_top_k is None:
            return teacher, self.head
        head = self.head.rows(top_tokens(teacher, self.head, self.args.teacher_top_k))
        return read_teacher(teacher.hidden, head), head

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW, or Muon for the matrices and AdamW for the rest."""
        if self.optimizer is None:
            args = self.args
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = make_optimizer(
                args.translator_optim, self.lens.parameters(), args.learning_rate, betas, args.weight_decay
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean KL since the last log, in both units, and the tokens that were read."""
        if "loss" in logs and self._passes:
            kl = self.accelerator.reduce(self._kl / self._passes, reduction="mean").item()
            self.check_finite(kl)
            logs |= {"kl": kl, "kl_bits": kl * BITS, "tokens": self.tokens}
            self._kl, self._passes = torch.zeros(()), 0
        super().log(logs, start_time)

    def check_finite(self, kl: float) -> None:
        """ValueError for a KL that is not a number any more."""
        if not math.isfinite(kl):
            raise ValueError(
                f"learning_rate: the KL is {kl} at step {self.state.global_step} with {self.args.learning_rate}; pass "
                "a lower one, and --force to fit anew"
            )

    # --- held-out text

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean KL in bits at 25, 50 and 75 % of the depth, and the mean of the three, on the validation blocks."""
        start = time.perf_counter()
        layers = [layer_at_depth(percent, self.lens.num_layers) for percent in DEPTHS]
        found = self.held_out(sorted(set(layers)), ("tuned",))
        bits = dict(zip(found.layers, (found.means["tuned"] * BITS).tolist(), strict=True))
        figures = {f"kl_bits_{percent}": bits[layer] for percent, layer in zip(DEPTHS, layers, strict=True)}
        figures["kl_bits"] = sum(figures.values()) / len(figures)
        self.check_finite(figures["kl_bits"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        if self.args.disable_tqdm and self.is_world_process_zero():
            logger.info(told(self.state.global_step, metrics))
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out(
        self, layers: Sequence[int] | None, lenses: Sequence[str], head: Head | None = None, progress: bool = False
    ) -> HeldOutKL:
        """Reads the validation blocks, each process its share; `head`: in another precision than the steps have it."""
        args = self.args
        own = range(len(self.validation_blocks))[args.process_index :: args.world_size]
        found = held_out_kl(
            self.lens, head or self.head, self.validation_blocks, own, self.bounds, layers, lenses,
            batch_size=args.per_device_eval_batch_size, seed=args.seed, progress=progress,
        )  # fmt: skip
        if args.world_size == 1:
            return found
        sums = {name: self.accelerator.reduce(total, reduction="sum") for name, total in found.sums.items()}
        count = self.accelerator.reduce(torch.tensor(found.positions, device=args.device), reduction="sum")
        return HeldOutKL(sums, found.layers, int(count))

    # --- checkpoints

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.args.load_best_model_at_end and self.state.best_metric is None:
            self._keep_start()
        super()._run_epoch(*args, **kwargs)

    def _keep_start(self) -> None:
        """Reads held-out text before the first step and keeps the start, which the steps may make no better."""
        self._determine_best_metric(self._evaluate(None, None), None)
        self.state.best_model_checkpoint = self._checkpoint_of(0)  # `Trainer` takes step 0 for none
        self._save_checkpoint(self.lens, None)

    def _checkpoint_of(self, step: int) -> str:
        return str(Path(str(self.args.output_dir)) / f"checkpoint-{step}")

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if self.state.best_global_step is not None:  # where it is now: the folder may have been moved
            self.state.best_model_checkpoint = self._checkpoint_of(self.state.best_global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            self.lens.save_pretrained(output_dir or str(self.args.output_dir), state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        self.lens.load_trained_tensors(tensors)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            folder = Path(output_dir)
            states.save_optimizer(self.create_optimizer().state_dict(), folder)
            states.save_scheduler(self.lr_scheduler, folder)
            progress = {"step": self.state.global_step, "tokens": self.tokens, "passes": self._passes}
            write_json(folder / PROGRESS_FILE, progress | {"kl": float(self._kl)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        optimizer = self.create_optimizer()
        optimizer.load_state_dict(states.read_optimizer(optimizer, folder))
        states.load_scheduler(self.lr_scheduler, folder)
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        self.tokens, self._passes = progress["tokens"], progress["passes"]
        self._kl = torch.tensor(progress["kl"])

    def _save_rng_state(self, output_dir: str) -> None:
        states.save_random_states(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states.load_random_states(Path(checkpoint), self.args.process_index)
