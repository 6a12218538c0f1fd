"""What the commands that read a suite of prompts have in common."""

from dataclasses import dataclass, field


@dataclass
class SuiteArguments:
    """The prompts, how the model is loaded, and the intervals."""

    revision: str | None = field(
        default=None,
        metadata={"help": "Commit, tag or branch of the model; default: the one that the lens was fitted at."},
    )
    suite: str = field(
        default="default",
        metadata={"help": "default, stories, or a file of prompts (.json, .jsonl, or a text with one a line)."},
    )
    num_bootstrap: int = field(default=1000, metadata={"help": "Resamples that the intervals are taken from."})
    seed: int = field(default=316, metadata={"help": "Of the resamples."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu or cuda:1; default: a GPU if there is one."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Precision of the weights; default: as the lens was fitted, else float32."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if self.num_bootstrap < 1:
            raise ValueError(f"num_bootstrap must be at least 1, got {self.num_bootstrap}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
