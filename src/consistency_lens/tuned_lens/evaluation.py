"""Evaluating a saved tuned lens on held-out text: the documents that no fit on that text reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic_write import check_writable
from .fit_arguments import ALL, POSITION_RANGE, check_position_range
from .fit_folder import BLOCKS_FOLDER, SETTINGS_FILE, read_json
from .held_out import EVAL_POSITIONS, LENSES, NORM, TUNED, held_out_kl
from .lens_places import is_lens
from .modeling_tuned_lens import SEED
from .residual_batches import make_head, position_bounds
from .saved import OpenedLens, check_opened, open_lens
from .token_arguments import TokenArguments
from .token_blocks import TokenBlocks, open_token_blocks, read_token_blocks


@dataclass
class EvaluationArguments:
    """Which lens, and on what text."""

    lens: str = field(default="", metadata={"help": "Folder of a tuned lens, or one of AlignmentResearch/tuned-lens."})
    model: str | None = field(
        default=None, metadata={"help": "The model, where it is not to be found at the place that the lens names."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Its commit, tag or branch; unset: the one that the lens was fitted at."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "As for fit, of whose held-out documents is read; unset: those held out from the lens."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "As for fit."})
    dataset_split: str = field(default="train", metadata={"help": "As for fit."})
    dataset_revision: str | None = field(default=None, metadata={"help": "As for fit."})
    text_column: str = field(default="text", metadata={"help": "As for fit."})
    tokens: int = field(default=65_536, metadata={"help": "Of the text, where a dataset is given."})
    seq_len: int = field(default=512, metadata={"help": "As for fit."})
    bos_per_sequence: bool = field(default=False, metadata={"help": "As for fit."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents that is held out; as it was for the fit."}
    )
    position_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of the context whose positions are read; unset: that of the fit, of a dataset 0.6 0.95."
        },
    )
    positions_per_sequence: str = field(
        default=str(EVAL_POSITIONS), metadata={"help": "Positions drawn of each sequence: a number, or all."}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences in a pass of the subject."})
    seed: int = field(default=SEED, metadata={"help": "Of the positions."})
    dtype: str | None = field(
        default=None, metadata={"help": "Of the weights; unset: as the lens was fitted, else float32."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; unset: a GPU if there is one."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the figures; unset: evaluation, in the folder of the lens."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if not self.lens:
            raise ValueError("lens: got none; pass the folder of a lens, e.g. --lens tuned_lenses/gpt2")
        count = self.positions_per_sequence
        if count != ALL and not (count.isdecimal() and int(count) > 0):
            raise ValueError(f"positions_per_sequence must be a whole number above 0 or {ALL}, got {count!r}")
        if self.position_range is not None:
            check_position_range(self.position_range)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.dataset is not None and self.tokens < self.seq_len:
            raise ValueError(
                f"tokens: got {self.tokens}, less than one sequence of {self.seq_len}; raise it or lower seq_len"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    @property
    def folder(self) -> Path:
        """Where the figures go."""
        return Path(self.output_dir or Path(self.lens, "evaluation"))


def evaluate_tuned_lens(args: EvaluationArguments) -> dict[str, Any]:
    """Mean KL of every layer, of the tuned lens, the norm lens and the calibrated norm lens.

    Returns:
        What `HeldOutKL.metrics` gives, and which text it was read on.

    Raises:
        ValueError: if the lens, its model or the text is not to be had, or the figures would be the lens's own and the
            model may be another.
        HubError: if the Hub cannot be reached.
    """
    wanted = None if args.dataset is None else text_of(args)
    if wanted is None:
        check_own_text(Path(args.lens))
    opened = open_lens(Path(args.lens), args.model, args.revision, args.dtype, args.device)
    if args.folder.resolve() == Path(args.lens).resolve():  # where the fit has left its own, which are published
        check_opened(opened, args.model is not None, "pass another --output_dir")
    blocks = open_token_blocks(Path(args.lens, BLOCKS_FOLDER)) if wanted is None else read_blocks(args, wanted, opened)
    check_writable(args.folder, "output_dir")
    lens = opened.lens
    assert lens is not None
    positions = None if args.positions_per_sequence == ALL else int(args.positions_per_sequence)
    found = held_out_kl(
        lens,
        make_head(lens, "float32"),
        blocks.validation,
        range(len(blocks.validation)),
        position_bounds(position_range(args), blocks.validation.shape[1]),
        lenses=LENSES if lens.is_calibrated else (TUNED, NORM),
        positions=positions,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=not args.disable_tqdm,
    )
    return found.metrics() | {"tokens": blocks.validation.size, "dataset": blocks.description}


def check_own_text(folder: Path) -> None:
    """Raises a ValueError for a lens beside which no text lies: those that were downloaded have none."""
    if is_lens(folder) and not (folder / BLOCKS_FOLDER).is_dir():
        raise ValueError(
            f"dataset: got none, and {str(folder)!r} has no text that was held out from its fit; pass one, such as "
            "--dataset stories.txt"
        )


def position_range(args: EvaluationArguments) -> Sequence[float]:
    """The share of the context that is read: of the fit's own text, the one that the lens was fitted at."""
    fitted = read_json(Path(args.lens, SETTINGS_FILE)) if args.dataset is None else {}
    return args.position_range or fitted.get("position_range") or POSITION_RANGE


def text_of(args: EvaluationArguments) -> TokenArguments:
    """The text to read, of which one sequence is left to the fit's side of the split."""
    return TokenArguments(
        dataset=args.dataset or "",
        dataset_config=args.dataset_config,
        dataset_split=args.dataset_split,
        dataset_revision=args.dataset_revision,
        text_column=args.text_column,
        tokens=args.seq_len,
        seq_len=args.seq_len,
        bos_per_sequence=args.bos_per_sequence,
        validation_tokens=args.tokens,
        validation_fraction=args.validation_fraction,
    )


def read_blocks(args: EvaluationArguments, wanted: TokenArguments, opened: OpenedLens) -> TokenBlocks:
    """The held-out blocks of another text, kept beside the figures."""
    folder, progress = args.folder / BLOCKS_FOLDER, not args.disable_tqdm
    return read_token_blocks(
        wanted, opened.subject, opened.tokenizer, opened.model, folder, args.seed, progress=progress
    )
