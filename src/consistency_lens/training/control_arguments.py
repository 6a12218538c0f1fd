"""Arguments that say how the trained tensors move: groups, unfreezing, averages; when to stop, and what to keep."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .group_settings import group_values
from .unfreezing import parse_unfreeze

GROUP_SETTINGS = ("group_learning_rates", "group_weight_decay", "group_max_grad_norm")
# Where a run goes that names no folder.
OUTPUTS = "outputs"
# How the names of figures end that get smaller as a lens gets better.
SMALLER_IS_BETTER = ("loss", "kl", "mse", "perplexity", "perplexity_ratio", "unused_token_share")


@dataclass(repr=False)  # `TrainingArguments` has its own, without the token
class ControlArguments(TrainingArguments):
    """What controls a run beside its objectives."""

    group_learning_rates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Learning rates of single parameter groups, over the settings above: 'prompts 1e-3' 'encoder_lora "
            "2e-4'. The groups are decoder_ and encoder_ with base, lora, projections or prompts; in YAML, a mapping."
        },
    )
    group_weight_decay: list[str] | None = field(
        default=None,
        metadata={"help": "Weight decay of single groups, likewise; norms and biases never decay."},
    )
    group_max_grad_norm: list[str] | None = field(
        default=None,
        metadata={"help": "Gradient norm that a group is clipped to by itself, likewise; max_grad_norm for the rest."},
    )
    unfreeze: list[str] | None = field(
        default=None,
        metadata={"help": "Groups that stand still at first: 'decoder_base 2e warmup 100s' 'lora 500s'."},
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of a running average of the trained tensors, which is evaluated and saved: 0.999; 0: off."
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "Ends the run after this many evaluations of its last stage without a better "
            "metric_for_best_model; 0: never."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better counts as better for early_stopping_patience."}
    )
    keep_best: int = field(
        default=0,
        metadata={
            "help": "Keeps only this many checkpoints with the best metric_for_best_model, and the last one (or the "
            "save_total_limit last); 0: does not look at the metric."
        },
    )

    def __post_init__(self) -> None:
        self.output_dir_given = self.output_dir is not None
        self.output_dir = OUTPUTS if self.output_dir is None else self.output_dir
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(SMALLER_IS_BETTER)
        super().__post_init__()
        if not self.output_dir_given and str(self.resume_from_checkpoint).lower() in ("true", "auto"):
            raise ValueError(
                f"resume_from_checkpoint: got {self.resume_from_checkpoint}, but without output_dir every run has a "
                "folder of its own; pass that of the run as output_dir, or the path of a checkpoint"
            )
        self.check_groups()
        self.check_metric_settings()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in 0..1, 1 left out, got {self.ema_decay}; 0.999 is usual, 0 is off")

    def check_groups(self) -> None:
        """Puts mappings and single texts into lists; ValueError for settings of groups that are not understood."""
        for name in (*GROUP_SETTINGS, "unfreeze"):
            value: Any = getattr(self, name)
            if isinstance(value, dict):
                value = [f"{group} {setting}" for group, setting in value.items()]
            setattr(self, name, [value] if isinstance(value, str) else value)
            if name in GROUP_SETTINGS:
                self.of_groups(name)
        parse_unfreeze(self.unfreeze or [])

    def of_groups(self, setting: str) -> dict[str, float]:
        """Group or kind -> number of one of the settings of groups."""
        return group_values(setting, getattr(self, setting) or [])

    @property
    def needs_metric(self) -> list[str]:
        """The settings in use that look at `metric_for_best_model`."""
        names = ("keep_best", "early_stopping_patience", "load_best_model_at_end")
        best = ["save_strategy"] if self.save_strategy == SaveStrategy.BEST else []
        return [name for name in names if getattr(self, name)] + best

    def check_metric_settings(self) -> None:
        """ValueError for best checkpoints or early stopping without what they need."""
        for name in ("keep_best", "early_stopping_patience", "early_stopping_threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in self.needs_metric:
            if self.metric_for_best_model is None:
                raise ValueError(f"{name}: needs metric_for_best_model; set it to fve, for example")
            if self.eval_strategy == "no":
                raise ValueError(f"{name}: needs evaluations; set eval_strategy to steps, and eval_steps")
        if self.keep_best and self.save_strategy != SaveStrategy.BEST:
            evaluations = self.save_steps / (self.eval_steps or 1)  # both may be shares of the run
            often = self.save_strategy != "steps" or abs(evaluations - round(evaluations)) < 1e-6
            if self.save_strategy != self.eval_strategy or not often:
                raise ValueError(
                    "keep_best: every checkpoint needs an evaluation of its own; set save_strategy to that of "
                    "eval_strategy and save_steps to a multiple of eval_steps"
                )
