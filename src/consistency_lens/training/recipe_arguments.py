"""What a recipe may say beside the training arguments."""

from dataclasses import dataclass, field

from ..configuration_consistency_lens import TRAINING_MODES
from ..data.sources import SourceArguments
from ..evaluation.arguments import CHECKS
from ..evaluation.controls import check_names

AT_LEAST_ONE = (
    *("eval_rows", "num_samples", "eval_fresh_encoder_steps", "interim_eval_rows", "tracked_samples"),
    "dry_run_processes",
)


@dataclass
class RecipeArguments(SourceArguments):
    """What is read, on which text, and how the lens is built."""

    model: str = field(default="", metadata={"help": "The subject: Hub id or folder of a causal LM."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the subject on the Hub."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the subject's weights."})
    quantization: str | None = field(
        default=None, metadata={"help": "8bit or 4bit weights of the subject, by bitsandbytes; not with clones=full."}
    )
    attention: str = field(
        default="auto",
        metadata={"help": "As transformers names it; auto: FlashAttention 2 where it runs, else sdpa, else eager."},
    )
    layer: int | None = field(default=None, metadata={"help": "Block whose output is read, 0-based; default: middle."})
    num_text_tokens: int = field(default=8, metadata={"help": "T, tokens of an explanation."})
    clones: str = field(default="full", metadata={"help": "Training of decoder and encoder: full, lora or frozen."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters with clones=lora."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules that get adapters, as PEFT names them."}
    )
    decoder_prompt: str = field(default="<embed>", metadata={"help": "Prompt with the slot <embed>."})
    encoder_prompt: str = field(default="<text>", metadata={"help": "Prompt with the slot <text>."})
    injection_layers: int = field(default=0, metadata={"help": "Inject A into the slot's input of blocks 1..n too."})
    stop_at_eos: bool = field(default=False, metadata={"help": "A text may end before T tokens, at an EOS."})
    output_layer: int | None = field(default=None, metadata={"help": "Blocks of the encoder; default layer + 1."})
    blocks: str | None = field(default=None, metadata={"help": "Path of the blocks in an unknown architecture."})
    final_norm: str | None = field(default=None, metadata={"help": "Path of the final norm, likewise."})

    summaries: str | None = field(
        default=None,
        metadata={"help": "Pairs of context and summary (file or Hub id), as further training rows."},
    )

    eval_rows: int = field(default=1024, metadata={"help": "Held-out activations in the final evaluation."})
    eval_checks: list[str] = field(
        default_factory=list, metadata={"help": f"Checks of the final evaluation, any of {', '.join(CHECKS)}."}
    )
    eval_fresh_encoder_steps: int = field(
        default=1000, metadata={"help": "Steps of the encoder that private_code trains on true text."}
    )
    num_samples: int = field(default=12, metadata={"help": "Sample rows shown and written at the end."})
    interim_eval_rows: int = field(
        default=256, metadata={"help": "Held-out activations that are measured whenever eval_strategy says so."}
    )
    sample_steps: int = field(default=500, metadata={"help": "Steps between sample tables; 0: none."})
    tracked_samples: int = field(default=128, metadata={"help": "Held-out activations in the sample tables."})

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check everything, print parameters, memory, steps, tokens and files, and do nothing: no weight "
            "is loaded, no file written."
        },
    )
    dry_run_processes: int | None = field(
        default=None, metadata={"help": "Processes that a dry run plans for; default: those that were started."}
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: got none; pass the subject's Hub id or folder, e.g. --model gpt2")
        super().__post_init__()
        if self.clones not in TRAINING_MODES:
            raise ValueError(f"clones must be one of {', '.join(TRAINING_MODES)}, got {self.clones!r}")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.sample_steps < 0:
            raise ValueError(f"sample_steps must be 0 (no tables) or more, got {self.sample_steps}")
        check_names("eval_checks", self.eval_checks, CHECKS)
        if self.num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {self.num_text_tokens}; 8 is a good start")
