"""Trainers of tuned lenses of a tiny model, and what tests ask of them."""

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import TrainerCallback

from consistency_lens.tuned_lens.fit_arguments import TunedLensTrainingArguments
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.trainer import TunedLensTrainer

SEQ_LEN = 12
LAYERS = 5  # of the subject: 4 translators
PLAIN = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0}


def new_lens(rank=4, **model):
    return TunedLens.for_model(tiny_model("llama", num_hidden_layers=LAYERS, **model), rank=rank)


def draw_blocks(count, seed=0):
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, (count, SEQ_LEN), dtype=np.int32)


@pytest.fixture
def make(tmp_path):
    """Makes a trainer; on 18 blocks, 4 a pass and 2 passes a step: 5 passes and 3 steps."""

    def make(lens=None, blocks=None, validation=None, **changes):
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "position_range": [0.0, 1.0]}
        settings |= {
            "positions_per_sequence": "3",
            "disable_tqdm": True,
            "use_cpu": True,
            "warmup_steps": 0.0,
            **PLAIN,
        }
        args = TunedLensTrainingArguments(**{"output_dir": str(tmp_path / "run"), **settings, **changes})
        blocks = draw_blocks(18) if blocks is None else blocks
        return TunedLensTrainer(
            lens or new_lens(), args, blocks, draw_blocks(3, 1) if validation is None else validation
        )

    return make


def batch_of(trainer, first=0):
    """A batch of four items."""
    items = [trainer.train_dataset[item] for item in range(first, first + 4)]
    return {name: torch.tensor(np.stack([item[name] for item in items])) for name in items[0]}


def gradients(trainer, batch):
    trainer.lens.zero_grad()
    trainer.compute_loss(trainer.lens, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.lens.named_parameters()}


class AtSteps(TrainerCallback):
    """Calls a function after every step, and once before the first."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen(state.global_step)
