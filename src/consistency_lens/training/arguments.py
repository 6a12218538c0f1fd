"""The training arguments: everything of `transformers.TrainingArguments`, and what a lens needs beside it."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from ..schedules import Schedule, check_duration, parse_duration
from .control_arguments import ControlArguments
from .profiling import steps_to_profile
from .sharding_arguments import ShardingArguments
from .unfreezing import Unfreezing

OBJECTIVES = ("warm_start", "gumbel", "policy_gradient")
LM_REFERENCES = ("subject", "warm_start")
LM_DIRECTIONS = ("forward", "reverse")
DELTA_RESIDUALS = ("none", "detached", "full")
REWARDS = ("-mse", "-log_mse", "-kl")
LM_ESTIMATORS = ("exact", "k3")
CHOICES = {
    "lm_reference": LM_REFERENCES,
    "lm_direction": LM_DIRECTIONS,
    "delta_residual": DELTA_RESIDUALS,
    "reward": REWARDS,
    "lm_estimator": LM_ESTIMATORS,
}
SCHEDULED = (
    "tau",
    "kl_weight",
    "lm_weight",
    "mse_weight",
    "entropy_weight",
    "ce_weight",
    "policy_weight",
    "learning_rate_schedule",
)


@dataclass(frozen=True)
class Stage:
    """One stretch of training: `objective` for `duration` ("1500s", "2e", "60%"; None: until the end)."""

    objective: str
    duration: str | None

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Reads `"warm_start 60%"`; ValueError for an unknown objective or what is no duration."""
        objective, *rest = text.split() or [""]
        if objective not in OBJECTIVES or len(rest) > 1:
            raise ValueError(
                f"stages: each is '<objective> [duration]' with objective one of {', '.join(OBJECTIVES)}, got {text!r}"
            )
        for duration in rest:
            check_duration("stages", duration)
        return cls(objective, rest[0] if rest else None)


def schedule(default: str, text: str) -> Any:
    """A field that takes one schedule, or one for each stage."""
    return field(default_factory=lambda: [default], metadata={"help": text})


@dataclass(repr=False)  # `TrainingArguments` has its own, without the token
class ConsistencyLensTrainingArguments(ShardingArguments, ControlArguments):
    """Arguments of `ConsistencyLensTrainer`. `learning_rate` is the decoder's.

    Weights and the temperature are schedules in the grammar of `schedules.py` ("linear 0 -> 1 over 50%"), which count
    steps from the start of a stage: one for all stages, or a list with one for each.
    """

    stages: list[str] = field(
        default_factory=lambda: ["warm_start 50%", "gumbel"],
        metadata={"help": "Objectives in order with their durations, e.g. 'warm_start 60%%' gumbel."},
    )
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the encoder; the decoder's if unset. Well above it is good."}
    )
    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of projections and prompts; their clone's if unset."}
    )
    learning_rate_schedule: list[str] | None = field(
        default=None,
        metadata={
            "help": "Factor on every learning rate, one schedule for each stage, e.g. 'cosine 1 -> 0.1 warmup 5%%'. "
            "Unset: lr_scheduler_type over the whole run."
        },
    )
    ce_weight: list[str] = schedule("1", "Warm start: weight of the decoder's cross-entropy.")
    mse_weight: list[str] = schedule("1", "Weight of the normalised squared error.")
    kl_weight: list[str] = schedule("1", "Gumbel: weight of KL(p(.|A) || p(.|reconstruction)).")
    lm_weight: list[str] = schedule("0.1", "Weight of the divergence from the LM reference.")
    entropy_weight: list[str] = schedule("0", "Gumbel: weight of the decoder's entropy (subtracted).")
    policy_weight: list[str] = schedule("1", "Weight of the policy-gradient term.")
    group_size: int = field(default=4, metadata={"help": "Policy gradient: texts sampled for each activation."})
    reward: str = field(
        default="-mse",
        metadata={"help": f"Policy gradient: one of {', '.join(REWARDS)}; on the command line --reward=-mse."},
    )
    scale_advantage: bool = field(
        default=True, metadata={"help": "Policy gradient: divide centred rewards by the spread of their group."}
    )
    prefix_budgets: bool = field(
        default=False, metadata={"help": "Policy gradient: the encoder reads the first t tokens, t drawn per group."}
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Policy gradient: what a text of T tokens loses of its reward."}
    )
    straight_through: bool = field(
        default=False,
        metadata={"help": "Policy gradient: the squared error reaches the decoder too, token by token."},
    )
    tau: list[str] = schedule("1", "Temperature of the straight-through gradient.")
    lm_reference: str = field(
        default="warm_start", metadata={"help": "What text is held close to.", "choices": LM_REFERENCES}
    )
    lm_direction: str = field(
        default="reverse",
        metadata={
            "help": "forward: KL(reference || decoder); reverse: KL(decoder || reference), what k3 estimates.",
            "choices": LM_DIRECTIONS,
        },
    )
    lm_estimator: str = field(
        default="exact",
        metadata={"help": "Policy gradient: the lm term over the vocabulary, or k3 from the sampled tokens."},
    )
    delta_residual: str = field(
        default="none",
        metadata={
            "help": "Gumbel: judge reconstruction + (A' - A'_hat) by the KL; detached stops its gradient.",
            "choices": DELTA_RESIDUALS,
        },
    )
    pair_in_batch: bool = field(
        default=True,
        metadata={
            "help": "delta_residual: A' is the activation of another document in the batch, whose A'_hat is there "
            "already; false: of any row, with a pass of its own."
        },
    )
    own_share: float = field(
        default=0.25,
        metadata={"help": "Warm start: share of rows whose text the encoder gets from the decoder itself."},
    )
    shorter_share: float = field(
        default=0.0,
        metadata={"help": "Warm start: share of rows with a tail of only t tokens, t uniform in 1..T."},
    )
    warm_start_patience: int = field(
        default=0,
        metadata={
            "help": "Ends warm start early after this many checks without a better held-out reconstruction; 0: never."
        },
    )
    warm_start_check_steps: int = field(default=100, metadata={"help": "Steps from one such check to the next."})
    share_contexts: bool = field(
        default=True,
        metadata={"help": "Run a context once for all rows of a batch that are read in it; the losses are the same."},
    )
    passes_by_length: bool = field(
        default=True,
        metadata={"help": "Run contexts of similar length in a pass of their own: less padding, and the same losses."},
    )
    positions_together: int = field(
        default=1,
        metadata={"help": "Rows of one document that follow each other, so that they share its context; 1: mixed."},
    )
    length_window: int = field(
        default=0,
        metadata={
            "help": "Rows whose contexts are of similar length meet in a step, out of those of so many steps: less "
            "padding, fewer shapes; 0: at random."
        },
    )
    logits_chunk_size: int = field(
        default=0,
        metadata={
            "help": "Rows of logits held at a time: the head runs on so many tokens, and once more in the backward "
            "pass, and memory stays flat in the vocabulary; 0 holds all of them."
        },
    )
    profile: str = field(
        default="false",
        metadata={"help": "true, or how many steps: where their time and memory go, in profile.json and a trace."},
    )
    max_nonfinite_steps: int = field(
        default=100, metadata={"help": "Stop after this many steps in a row with gradients that are not finite."}
    )

    def __post_init__(self) -> None:
        if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and not self.fp16:
            self.bf16 = True  # what the launcher says holds; DeepSpeed wants to hear it twice
        super().__post_init__()
        self.remove_unused_columns = False  # the collator reads columns that `forward` does not name
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained tensor is used in every forward
        self.check_schedules()
        self.check_choices()
        self.check_numbers()
        self.check_optimizer()
        self.check_stage_settings()
        self.profile = str(self.profile).lower()
        steps_to_profile(self.profile)

    @property
    def num_profiled_steps(self) -> int:
        """Steps that are profiled."""
        return steps_to_profile(self.profile)

    def check_schedules(self) -> None:
        """Puts a schedule that is given alone into a list; ValueError for what is none, or a wrong number of them."""
        count = len(self.parsed_stages())
        for name in SCHEDULED:
            value = getattr(self, name)
            if value is None:
                continue
            texts = [str(text) for text in value] if isinstance(value, list) else [str(value)]
            setattr(self, name, texts)
            wanted = (count,) if name == "learning_rate_schedule" else (1, count)
            if len(texts) not in wanted:
                raise ValueError(f"{name}: got {len(texts)} schedules for {count} stages; give one each")
            try:
                schedules = [Schedule.parse(text) for text in texts]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            for parsed in schedules:
                if name == "tau" and parsed.lowest() <= 0:
                    raise ValueError(
                        f"tau must stay positive, in a warmup too ('warmup 9s from 2'), got {texts}; 0.1 to 2 is usual"
                    )

    def check_choices(self) -> None:
        """ValueError for a setting that is not one of those it may be."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.lm_estimator == "k3" and self.lm_direction == "forward":
            raise ValueError("lm_estimator='k3' estimates KL(decoder || reference); set lm_direction to reverse")

    def check_numbers(self) -> None:
        """ValueError for a number that is out of range."""
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}; a group of one has no advantage")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}; or set max_steps")
        for name in ("learning_rate", "encoder_learning_rate", "projection_learning_rate"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0..{2**32 - 1}, got {self.seed}")
        for name in ("own_share", "shorter_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name, least in (
            ("length_penalty", 0),
            ("warm_start_patience", 0),
            ("warm_start_check_steps", 1),
            ("positions_together", 1),
            ("length_window", 0),
            ("logits_chunk_size", 0),
            # those of `TrainingArguments`, which takes any
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("dataloader_num_workers", 0),
            ("max_nonfinite_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")

    def check_optimizer(self) -> None:
        """ValueError for a number that the optimizer would not take, or that cannot be written into a checkpoint."""
        if not self.adam_epsilon > 0:
            raise ValueError(f"adam_epsilon must be above 0, got {self.adam_epsilon}; 1e-8 is usual")
        for name, end in (("weight_decay", None), ("adam_beta1", 1), ("adam_beta2", 1)):
            if not getattr(self, name) >= 0 or (end is not None and getattr(self, name) >= end):
                kind = "0 or more" if end is None else f"0 or more and below {end}"
                raise ValueError(f"{name} must be {kind}, got {getattr(self, name)}")
        for item in fields(self):
            value = getattr(self, item.name, None)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name} must be finite, got {value}")

    def check_stage_settings(self) -> None:
        """ValueError for stages that cannot follow each other, or for settings that do not go with them."""
        stages = self.parsed_stages()
        if any(stage.duration is None for stage in stages[:-1]) or stages[-1].duration is not None:
            raise ValueError(
                f"stages: every stage but the last needs a duration ('warm_start 60%'), and the last runs to the end; "
                f"got {self.stages}"
            )
        if self.warm_start_patience > 0 and not any(stage.objective == "warm_start" for stage in stages[:-1]):
            raise ValueError(
                f"warm_start_patience: got {self.warm_start_patience}, but no stage follows a warm start; set it to 0"
            )
        if stages[0].objective != "warm_start" and self.lm_reference == "warm_start" and self.has_weight("lm"):
            raise ValueError(
                "lm_reference='warm_start' needs a warm_start stage first; add one, or take lm_reference=subject"
            )
        if self.length_penalty > 0 and self.prefix_budgets:
            raise ValueError("length_penalty taxes words that prefix_budgets gives no credit for; leave one out")
        if self.length_penalty > 0 and self.shorter_share == 0:
            raise ValueError("length_penalty: warm start teaches to stop by shorter tails; raise shorter_share")
        if self.needs_metric and str(self.metric_for_best_model).endswith("loss") and len(stages) > 1:
            raise ValueError(
                f"{self.needs_metric[0]}: the loss is another one in each stage; set metric_for_best_model to fve"
            )

    def has_weight(self, term: str) -> bool:
        """Whether a loss term ever counts: schedules that are 0 throughout switch it off."""
        return not all(Schedule.parse(text).is_zero() for text in getattr(self, f"{term}_weight"))

    def needs_others(self) -> bool:
        """Whether a stage takes a second activation A' beside each."""
        return self.delta_residual != "none" and any(stage.objective == "gumbel" for stage in self.parsed_stages())

    def keeps_warm_start(self) -> bool:
        """Whether a stage holds text close to the decoder as warm start left it, so that a copy of it is needed."""
        later = any(stage.objective != "warm_start" for stage in self.parsed_stages())
        return later and self.lm_reference == "warm_start" and self.has_weight("lm")

    def schedule_of(self, name: str, stage: int) -> str:
        """The schedule of a weight, the temperature or the learning rate in the stage of that index."""
        texts = getattr(self, name)
        return texts[min(stage, len(texts) - 1)]

    def parsed_stages(self) -> list[Stage]:
        """The stages in order; ValueError if there are none or one is not understood."""
        if not self.stages:
            raise ValueError("stages: got none; give at least one, e.g. 'warm_start 60%' gumbel")
        return [Stage.parse(text) for text in self.stages]

    def check_stages(self) -> None:
        """Finds stages that do not fit `max_steps` before there is any data; those in epochs have to wait for it.

        Raises:
            ValueError: if the stages before the last use up all steps, or a group would never train.
        """
        in_epochs = any(stage.duration is not None and stage.duration.endswith("e") for stage in self.parsed_stages())
        if self.max_steps > 0 and not in_epochs:
            self.stage_starts(None, self.max_steps)
        known = [text for text in self.unfreeze or [] if not any(word.endswith("e") for word in text.split()[1::2])]
        if self.max_steps > 0:
            Unfreezing.resolve(known, None, self.max_steps)

    def stage_starts(self, steps_per_epoch: int | None, total_steps: int) -> list[int]:
        """First step of each stage.

        Raises:
            ValueError: if the stages before the last use up all steps.
        """
        starts = [0]
        durations = [stage.duration for stage in self.parsed_stages()[:-1] if stage.duration is not None]
        for duration in durations:
            starts.append(starts[-1] + parse_duration(duration, steps_per_epoch, total_steps))
        if starts[-1] >= total_steps and len(starts) > 1:
            raise ValueError(
                f"stages: the last would start at step {starts[-1]} of {total_steps}; shorten those before"
            )
        return starts
