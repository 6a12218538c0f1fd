"""How a lens is evaluated."""

from dataclasses import dataclass, field

from .controls import CONTROLS, check_names


@dataclass
class EvaluationArguments:
    """How a lens is evaluated.

    Raises:
        ValueError: for a number below 1 or an unknown control.
    """

    rows: int = field(default=1024, metadata={"help": "At most this many rows, drawn at random."})
    batch_size: int = field(default=64, metadata={"help": "Rows in a batch; it does not change the result."})
    seed: int = field(default=0, metadata={"help": "Of the choice of rows, the random controls and the bootstrap."})
    num_bootstrap: int = field(default=1000, metadata={"help": "Resamples of the 95% intervals."})
    controls: list[str] = field(
        default_factory=lambda: list(CONTROLS), metadata={"help": f"Any of {', '.join(CONTROLS)}."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "num_bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_names(self.controls)
