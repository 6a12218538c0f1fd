"""A running average of the trained tensors, which is evaluated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic_write import write_tensors
from ..modeling_consistency_lens import ConsistencyLensModel

AVERAGES_FILE = "ema.safetensors"


class Averages(TrainerCallback):
    """An exponential moving average of every trained tensor, in float32, one copy of them more in memory.

    After the optimizer step that follows n others, average <- d average + (1 - d) tensor, with
    d = min(decay, (1 + n) / (10 + n)), so that the first steps are soon forgotten. Frozen tensors are left alone. The
    run goes on with its own tensors; at its end the lens holds the averages.

    Args:
        lens: without wrapper.
        decay: between 0 and 1.

    Attributes:
        averages: name -> average of each trained parameter; empty before the run and after it.
    """

    def __init__(self, lens: ConsistencyLensModel, decay: float) -> None:
        self.lens = lens
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def start(self) -> None:
        """Begins with the tensors as they are.

        Raises:
            ValueError: if one is not in float32, where an average of many steps would not fit.
        """
        trained = {name: tensor for name, tensor in self.lens.named_parameters() if tensor.requires_grad}
        for name, tensor in trained.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"ema_decay: trained tensors must be float32, {name} is {tensor.dtype}; set it to 0")
        self.parameters = trained
        self.averages = {name: tensor.detach().clone() for name, tensor in trained.items()}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the tensors of the step in; a step that was skipped leaves them, and them alone, as they were."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the averages in the lens."""
        self.swap()
        self.averages, self.parameters = {}, {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averages into the lens, and its own tensors back to the bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averages and tensors, one at a time, so that no more memory is needed than for the largest."""
        for name, average in self.averages.items():
            kept = self.parameters[name].detach().clone()
            self.parameters[name].copy_(average)
            average.copy_(kept)

    def save(self, folder: Path) -> None:
        """Writes what `model.safetensors` would hold with the averages in place."""
        write_tensors(folder / AVERAGES_FILE, {**self.lens.trained_tensors(), **self.averages})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        saved = load_file(folder / AVERAGES_FILE)
        for name, average in self.averages.items():
            average.copy_(saved[name])


def check_averages(folder: Path, averaging: bool) -> None:
    """Checks that a run goes on from a checkpoint with averages as it was.

    Raises:
        ValueError: if `ema_decay` was on and is off now, or the other way round.
    """
    if (folder / AVERAGES_FILE).is_file() != averaging:
        before, now = ("off", "on") if averaging else ("on", "off")
        raise ValueError(f"ema_decay: it is {now}, but was {before} in {str(folder)!r}; set it as it was")
