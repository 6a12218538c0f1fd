"""`consistency-lens tuned-lens verify`: tuned lenses against their checksums, their provenance and their model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ...data.subject_loading import LoadedSubject


@dataclass
class VerifyArguments:
    """Which lens is verified, and with which model."""

    lens: str = field(default="", metadata={"help": "Folder of a tuned lens, or one with such below it."})
    model: str | None = field(
        default=None,
        metadata={"help": "Its model, Hub id or folder: commit, weights and tokenizer are compared, and it is read."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "Of the model on the Hub; default: the commit that the lens was fitted on."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Precision of the model; default: as it was when the lens was fitted."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; default: the CPU."})

    def __post_init__(self) -> None:
        if not self.lens:
            raise ValueError("lens: got none; pass it, e.g. --lens tuned_lenses/gpt2")


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies; prints a table of checks for each lens. Returns 3 if one does not pass."""
    from ..command import DONE, NOT_VERIFIED, run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> int:
        (args,) = parse_arguments((VerifyArguments,), argv, "tuned-lens verify")
        return DONE if verify(args, console) else NOT_VERIFIED

    return run_command(work)


def verify(args: VerifyArguments, console: "Console") -> bool:
    """The work of the command: whether all lenses passed.

    Raises:
        ValueError: if there is none, or one model for several.
    """
    from ...tuned_lens.content_checks import find_tuned_lenses
    from ...tuned_lens.verification import verify_tuned_lens
    from ..checks import show_checks

    lenses = find_tuned_lenses(args.lens)
    if args.model is not None and len(lenses) > 1:
        raise ValueError(f"model: {args.lens!r} has {len(lenses)} lenses, each of its own model; pass one of them")
    failed = 0
    for lens in lenses:
        subject = None if args.model is None else load_subject(args, lens)
        checks = verify_tuned_lens(lens, subject)
        failed += not all(check.passed for check in checks)
        show_checks(lens, checks, console)
    untried = "" if args.model is not None else "; none was read with its model, pass --model for that"
    console.print(f"{len(lenses) - failed} of {len(lenses)} lenses passed{untried}", highlight=False)
    return not failed


def load_subject(args: VerifyArguments, folder: Path) -> "LoadedSubject":
    """The model, loaded as it was when the lens was fitted unless `dtype` and `revision` say otherwise.

    Raises:
        ValueError: if it cannot be loaded, or the lens says nothing of it.
    """
    from ...data.subject_loading import load_subject_and_tokenizer
    from ...tuned_lens.content_checks import read_tuned_lens

    assert args.model is not None
    lens = read_tuned_lens(folder)
    revision = args.revision
    if revision is None and args.model == lens.provenance.get("model_id") and not Path(args.model).is_dir():
        revision = lens.provenance.get("model_commit")
    dtype = args.dtype or lens.config.get("base_config", {}).get("dtype") or "float32"
    return load_subject_and_tokenizer(args.model, revision, dtype, device=args.device)
