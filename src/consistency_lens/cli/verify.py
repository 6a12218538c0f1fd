"""`consistency-lens verify`: an activation cache against its provenance, and that against the subject."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..data.cache_against_subject import LoadedWeights
    from ..data.cache_check import Check


@dataclass
class VerifyArguments:
    """Which cache is verified, and against which subject."""

    cache: str = field(
        default="", metadata={"help": "Folder of a cache, or a folder that has caches below it: all are verified."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "The subject, Hub id or folder: weights, tokenizer and a sample of rows are compared."},
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the subject on the Hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "Precision of the subject; default: as it was when the cache was made."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; default: the CPU."})
    blocks: str | None = field(default=None, metadata={"help": "Path of the blocks in an unknown architecture."})
    rows: int = field(default=64, metadata={"help": "Rows whose activations are computed anew, spread evenly."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if not self.cache:
            raise ValueError("cache: got none; pass it, e.g. --cache data/activations")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}; 64 is a good start")


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies caches; prints a table of checks for each. Returns 3 if one does not pass."""
    from .command import DONE, NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> int:
        from ..data.cache_verification import find_caches, verify_cache

        (args,) = parse_arguments((VerifyArguments,), argv, "verify")
        caches = find_caches(args.cache)
        subject = None if args.model is None else load_subject(args, caches)
        failed = 0
        for cache in caches:
            name = None if cache == Path(args.cache) else str(cache.relative_to(args.cache))
            checks = verify_cache(cache, subject, args.rows, progress=not args.disable_tqdm, name=name)
            failed += not all(check.passed for check in checks)
            console.print(str(cache), markup=False, highlight=False, soft_wrap=True)
            console.print(checks_table(checks))
        console.print(f"{len(caches) - failed} of {len(caches)} caches passed")
        return NOT_VERIFIED if failed else DONE

    return run_command(work)


def load_subject(args: VerifyArguments, caches: Sequence[Path]) -> "LoadedWeights":
    """The subject, loaded as it was when the caches were made unless `dtype` says otherwise.

    Raises:
        ValueError: if it cannot be loaded, or the caches were made from it in several precisions.
    """
    import json

    from ..data.activation_cache import PROVENANCE_FILE
    from ..data.cache_against_subject import load_weights, made_as
    from ..data.subject_loading import load_subject_and_tokenizer

    assert args.model is not None
    files = [cache / PROVENANCE_FILE for cache in caches]
    try:
        made = [made_as(json.loads(file.read_text(encoding="utf-8"))) for file in files if file.is_file()]
    except ValueError:
        made = []  # the verification says what is wrong with the provenance
    dtypes = sorted({of["dtype"] or "float32" for of in made})
    quantizations = {of["quantization"] for of in made}
    if len(quantizations) > 1 or (len(dtypes) > 1 and args.dtype is None):
        raise ValueError(
            f"cache: {args.cache!r} has caches of a subject loaded in several ways ({', '.join(dtypes)}); verify one "
            "at a time"
        )
    dtype = args.dtype or (dtypes[0] if dtypes else "float32")
    quantization = next(iter(quantizations), None)
    subject = load_subject_and_tokenizer(args.model, args.revision, dtype, quantization, device=args.device)
    return load_weights(subject, args.blocks)


def checks_table(checks: "Sequence[Check]") -> "Table":
    """One row a check; what failed stands out."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("check", "", "found"):
        table.add_column(name)
    for check in checks:
        if check.passed:
            verdict = Text("passed", style="green")
        else:
            verdict = Text("FAILED", style="bold red") if check.checked else Text("not checked", style="yellow")
        # as Text, since a name may look like rich's markup
        table.add_row(Text(check.name), verdict, Text(check.detail))
    return table
