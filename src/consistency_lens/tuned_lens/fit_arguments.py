"""What a fit of a tuned lens can be told beside its text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..data.subject_loading import DTYPES
from .configuration_tuned_lens import PRECONDITIONERS
from .modeling_tuned_lens import SEED
from .moments import check_ridge
from .optimizer import OPTIMIZERS
from .token_arguments import TokenArguments

AUTO, FULL, ALL = "auto", "full", "all"
HEAD_DTYPES = (AUTO, "float32", "bfloat16")
POSITION_RANGE = (0.6, 0.95)
# What `TrainingArguments` has beside, and what speaks against it in a fit.
FLOAT32 = "translators are fitted in float32"
GOES_ON = "a fit goes on by itself from where it was killed"
HAS_OWN = "a fit has translator_optim"
SMALL = "a tuned lens is small; fit it on one process or several with DDP"
REFUSED = {
    "bf16": FLOAT32, "fp16": FLOAT32, "fsdp": SMALL, "deepspeed": SMALL, "optim": HAS_OWN, "optim_args": HAS_OWN,
    "adam_epsilon": "it stays 1e-8",
    "resume_from_checkpoint": GOES_ON, "save_only_model": GOES_ON, "eval_on_start": "held-out text is read at the "
    "start of every fit", "auto_find_batch_size": "the number of steps depends on the batch size",
    "gradient_checkpointing": "the subject runs without gradients", "push_to_hub": "publish the lens when its gates "
    "have been judged",
}  # fmt: skip

# The least that numbers may be; `TrainingArguments` takes any.
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "rows_per_step": 1, "early_stopping_patience": 0, "num_train_epochs": 0, "learning_rate": 0, "seed": 0,
    "smallness": 0, "smoothness": 0,
}  # fmt: skip


@dataclass
class FitArguments(TokenArguments):
    """The subject, the lens and its closed-form start."""

    model: str = field(default="", metadata={"help": "The subject: Hub id or folder of a causal language model."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the subject on the Hub."})
    dtype: str = field(default="float32", metadata={"help": "Of the subject's weights.", "choices": DTYPES})
    device: str | None = field(default=None, metadata={"help": "Where the subject goes; unset: where the fit runs."})
    device_map: str | None = field(
        default=None, metadata={"help": "auto spreads a subject that is larger than a GPU."}
    )
    rank: str = field(
        default=AUTO,
        metadata={"help": "Of the translators: a number, full, or auto: clip(d/32, 64, 256), 256 from d = 4096 on."},
    )
    learn_temperature: bool = field(default=True, metadata={"help": "A temperature for each layer."})
    preconditioner: str = field(
        default="none", metadata={"help": "The basis of the translators.", "choices": PRECONDITIONERS}
    )
    ridge_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Of the tokens, those that the closed form is solved on; 0: start close to the norm lens. Unset: "
            "an eighth, at most a million."
        },
    )
    ridge: float = field(default=1e-2, metadata={"help": "Its penalty, as a share of the residuals' mean variance."})
    force: bool = field(default=False, metadata={"help": "Fit anew where a lens or a part of one is there."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not self.model:
            raise ValueError("model: got none; pass it, e.g. --model gpt2")
        self.rank = str(self.rank)
        if self.rank not in (AUTO, FULL) and not (self.rank.isdecimal() and int(self.rank) > 0):
            raise ValueError(f"rank must be a whole number above 0, {FULL} or {AUTO}, got {self.rank!r}")
        if self.ridge_tokens is None:
            self.ridge_tokens = min(self.tokens // 8, 1_000_000)
        if not 0 <= self.ridge_tokens <= self.tokens:
            raise ValueError(
                f"ridge_tokens must lie in 0..{self.tokens} (tokens), got {self.ridge_tokens}; an eighth of them is a "
                "good start"
            )
        if self.preconditioner != "none" and self.ridge_tokens == 0:
            raise ValueError(
                f"preconditioner: {self.preconditioner!r} is fitted with the closed form, but ridge_tokens is 0; "
                "leave one of them out"
            )
        check_ridge(self.ridge)


@dataclass(repr=False)  # `TrainingArguments` has its own, without the token
class TunedLensTrainingArguments(TrainingArguments):
    """Arguments of `TunedLensTrainer`: `TrainingArguments` with the defaults of a fit.

    A step has `rows_per_step` positions: a pass with more of them serves several steps. There is no weight decay, for
    `smallness` is that penalty already.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the lens; unset: tuned_lenses/<name of the model>."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences in a pass of the subject."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "The same for held-out text."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Passes of a step."})
    num_train_epochs: float = field(default=1, metadata={"help": "Times that the text is gone through."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The highest, after warm-up."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Of the learning rate; cosine ends at 0."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1 a share of all."})
    seed: int = field(default=SEED, metadata={"help": "Of positions, layers and first values."})
    eval_strategy: str = field(default="steps", metadata={"help": "When held-out text is read."})
    eval_steps: float = field(default=100, metadata={"help": "Steps from one such reading to the next."})
    save_strategy: str = field(default="steps", metadata={"help": "As eval_strategy."})
    save_steps: float = field(default=100, metadata={"help": "As eval_steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Ends with the best of those readings."})
    metric_for_best_model: str | None = field(default="kl_bits", metadata={"help": "What is best."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Less is better."})
    logging_steps: float = field(default=10, metadata={"help": "Steps from one figure of the bar to the next."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Tokens are too few for it to matter."})
    translator_optim: str = field(
        default="adamw", metadata={"help": "muon is for the matrices, with AdamW for the rest.", "choices": OPTIMIZERS}
    )
    layers_per_step: str = field(
        default=AUTO,
        metadata={"help": "Layers drawn for each step: a number, all, or auto: 24 at most, fewer for V > 32000."},
    )
    positions_per_sequence: str = field(
        default=AUTO, metadata={"help": "Positions of a sequence: a number, all, or auto: 16, fewer for V > 32000."}
    )
    rows_per_step: int = field(
        default=128,
        metadata={"help": "Positions of a step, of all processes; a pass with more of them serves several steps."},
    )
    position_range: list[float] = field(
        default_factory=lambda: [*POSITION_RANGE],
        metadata={"help": "Share of the context that positions are drawn from."},
    )
    smallness: float = field(default=1e-4, metadata={"help": "Weight of the sum of squares of U, V and c."})
    smoothness: float = field(
        default=1e-4, metadata={"help": "Weight of the squared distance between the maps of layers side by side."}
    )
    teacher_top_k: int | None = field(
        default=None, metadata={"help": "Only the teacher's most probable tokens of each position; unset: all."}
    )
    head_dtype: str = field(
        default=AUTO,
        metadata={
            "help": "Of the unembedding; auto: bfloat16 for V >= 100000 where that is fast.",
            "choices": HEAD_DTYPES,
        },
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "Ends after this many readings that are not better; 0: never."}
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = ""  # `fit_tuned_lens` names it after the model
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.name in REFUSED and value != argument.default:
                raise ValueError(f"{argument.name}: got {value!r}, but {REFUSED[argument.name]}; leave it out")
            if argument.name in LEAST and not LEAST[argument.name] <= value < math.inf:
                raise ValueError(
                    f"{argument.name} must be {LEAST[argument.name]} or more, got {value}; {argument.default} is usual"
                )
        check_choices(self)
        super().__post_init__()
        self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # a step may leave layers out
        for name in ("layers_per_step", "positions_per_sequence"):
            value = str(getattr(self, name))
            if value not in (AUTO, ALL) and not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"{name} must be a whole number above 0, {ALL} or {AUTO}, got {value!r}")
        check_position_range(self.position_range)
        if self.teacher_top_k is not None and self.teacher_top_k < 2:
            raise ValueError(f"teacher_top_k must be at least 2, got {self.teacher_top_k}; 4096 is a good start")
        self._check_best()

    def _check_best(self) -> None:
        """Raises a ValueError for settings under which not every reading of held-out text has a checkpoint."""
        if self.load_best_model_at_end and (self.eval_strategy, self.eval_steps) != (
            self.save_strategy,
            self.save_steps,
        ):
            raise ValueError(
                f"save_steps: got {self.save_steps:g} and eval_steps {self.eval_steps:g}; set them alike, so that the "
                "best reading is kept, or load_best_model_at_end to false"
            )
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience: needs load_best_model_at_end; set one to 0 or the other to true"
            )

    def count_of(self, name: str, automatic: int, available: int) -> int:
        """What a setting that may be "auto" or "all" comes to, no more than there are."""
        value = str(getattr(self, name))
        if value == ALL:
            return available
        return min(available, automatic if value == AUTO else int(value))

    def to_json_settings(self) -> dict[str, Any]:
        """The arguments as JSON takes them, without where they are written to."""
        return {name: value for name, value in self.to_dict().items() if name != "output_dir"}


def check_position_range(shares: Sequence[float]) -> None:
    """Raises a ValueError for what is no part of the context."""
    if len(shares) != 2 or not 0 <= shares[0] < shares[1] <= 1:
        raise ValueError(f"position_range must be two shares of the context, got {list(shares)}; 0.6 0.95")


def check_choices(arguments: Any) -> None:
    """Raises a ValueError for a value that is not among its field's choices: a parser looks, a caller may not have."""
    for argument in fields(arguments):
        choices = argument.metadata.get("choices")
        value = getattr(arguments, argument.name)
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"{argument.name} must be one of {', '.join(choices)}, got {value!r}")
