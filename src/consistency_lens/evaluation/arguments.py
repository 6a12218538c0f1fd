"""How a lens is evaluated."""

from dataclasses import dataclass, field

from .controls import CONTROLS, check_names

CHECKS = ("linear_probe", "private_code", "best_of_n", "text_length", "ablation", "steering")
# The controls and checks that are fitted to training rows.
FITTED = ("residual_vq", "linear_probe", "private_code")


@dataclass
class EvaluationArguments:
    """How a lens is evaluated.

    Raises:
        ValueError: for a number below 1, a learning rate that is not positive, an unknown control or an unknown check.
    """

    rows: int = field(default=1024, metadata={"help": "At most this many rows, drawn at random."})
    batch_size: int = field(default=64, metadata={"help": "Rows in a batch; it does not change the result."})
    seed: int = field(default=0, metadata={"help": "Of the choice of rows and of all else that is random."})
    num_bootstrap: int = field(default=1000, metadata={"help": "Resamples that the intervals are taken from."})
    controls: list[str] | None = field(
        default=None,
        metadata={"help": f"Any of {', '.join(CONTROLS)}. By default all; residual_vq if there are training rows."},
    )
    checks: list[str] = field(
        default_factory=list, metadata={"help": f"Any of {', '.join(CHECKS)}; each takes its time."}
    )
    training_rows: int = field(
        default=16384, metadata={"help": "At most this many training rows, for residual_vq and linear_probe."}
    )
    best_of: int = field(default=16, metadata={"help": "Texts drawn for each row by best_of_n."})
    check_rows: int = field(default=256, metadata={"help": "At most this many rows in ablation and steering."})
    fresh_encoder_steps: int = field(
        default=1000, metadata={"help": "Steps of 64 training rows that private_code trains its own encoder for."}
    )
    fresh_encoder_learning_rate: float = field(
        default=3e-3, metadata={"help": "Of that training; too high for a large model that is trained in full."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        sizes = ("rows", "batch_size", "num_bootstrap", "training_rows", "best_of", "check_rows")
        for name in (*sizes, "fresh_encoder_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.fresh_encoder_learning_rate > 0:
            raise ValueError(
                f"fresh_encoder_learning_rate must be positive, got {self.fresh_encoder_learning_rate}; try 3e-3"
            )
        check_names("controls", self.controls or [], CONTROLS)
        check_names("checks", self.checks, CHECKS)

    def chosen_controls(self, has_training_rows: bool) -> list[str]:
        """The controls to run: those asked for, or all that can be made.

        Raises:
            ValueError: if there are no training rows for one that is asked for, or for a check.
        """
        if has_training_rows:
            return list(CONTROLS) if self.controls is None else self.controls
        fitted = [name for name in [*(self.controls or []), *self.checks] if name in FITTED]
        if fitted:
            raise ValueError(
                f"evaluation: {fitted[0]} is fitted to training rows, got none; pass `train_rows` or leave it out"
            )
        return [name for name in CONTROLS if name not in FITTED] if self.controls is None else self.controls
