"""`consistency-lens verify`: lenses and activation caches against their checksums, provenance and model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .artifact_kinds import CACHE, LENS, find_artifacts
from .checks import show_checks

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.cache_against_subject import LoadedWeights


@dataclass
class VerifyArguments:
    """What is verified, and against which model."""

    path: str = field(
        default="",
        metadata={"help": "Folder of a lens, a tuned lens or a cache, or one with such below it: all are verified."},
    )
    cache: str = field(default="", metadata={"help": "The same, of caches alone."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "The model that was read, Hub id or folder: weights and tokenizer are compared, a lens is loaded "
            "over it, some rows of a cache are computed anew. Default, for a lens: its own, where it is at hand."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model on the Hub."})
    dtype: str | None = field(
        default=None, metadata={"help": "Precision of the model; default: as it was when it was read."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1; default: the CPU."})
    blocks: str | None = field(default=None, metadata={"help": "Path of the blocks in an unknown architecture."})
    rows: int = field(default=64, metadata={"help": "Rows of a cache that are computed anew, spread evenly."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if not self.path and not self.cache:
            raise ValueError("path: got none; pass it, e.g. --path outputs/tiny_stories")
        if self.path and self.cache:
            raise ValueError(f"path: got {self.path!r} and the cache {self.cache!r}; pass one of them")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}; 64 is a good start")


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies what lies at a path; prints a table of checks for each. Returns 3 if one does not pass."""
    from .command import DONE, NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> int:
        (args,) = parse_arguments((VerifyArguments,), argv, "verify")
        found = find_artifacts(Path(args.path)) if args.path else {CACHE: caches_at(args.cache)}
        if not found:
            raise ValueError(f"path: no lens and no activation cache at {args.path!r} or below it; pass one")
        verify = {CACHE: verify_caches, LENS: verify_lenses}
        passed = [verify.get(kind, verify_tuned_lenses)(args, folders, console) for kind, folders in found.items()]
        return DONE if all(passed) else NOT_VERIFIED

    return run_command(work)


def caches_at(path: str) -> list[Path]:
    """The folders of the caches at a path or below it.

    Raises:
        ValueError: if there is none.
    """
    from ..data.cache_verification import find_caches

    return find_caches(path)


def verify_caches(args: VerifyArguments, caches: Sequence[Path], console: "Console") -> bool:
    """Verifies caches; whether all of them passed."""
    from ..data.cache_verification import verify_cache

    top = args.path or args.cache
    subject = None if args.model is None else load_subject(args, caches)
    failed = 0
    for cache in caches:
        name = None if cache == Path(top) else str(cache.relative_to(top))
        checks = verify_cache(cache, subject, args.rows, progress=not args.disable_tqdm, name=name)
        failed += not all(check.passed for check in checks)
        show_checks(cache, checks, console)
    console.print(f"{len(caches) - failed} of {len(caches)} caches passed")
    return not failed


def verify_lenses(args: VerifyArguments, lenses: Sequence[Path], console: "Console") -> bool:
    """Verifies lenses, decoders and encoders; whether none of them failed a check."""
    from ..hub.artifact_checks import failed
    from ..hub.lens_checks import verify_lens

    wrong, open_checks = 0, set()
    for lens in lenses:
        checks = verify_lens(lens, args.model, args.revision, args.dtype, args.device)
        wrong += bool(failed(checks))
        open_checks |= {check.name for check in checks if not check.checked}
        show_checks(lens, checks, console)
    untold = f"; not checked: {', '.join(sorted(open_checks))}" if open_checks else ""
    console.print(f"{len(lenses) - wrong} of {len(lenses)} lenses passed{untold}", highlight=False)
    return not wrong


def verify_tuned_lenses(args: VerifyArguments, _lenses: Sequence[Path], console: "Console") -> bool:
    """Verifies tuned lenses; whether all of them passed."""
    from .tuned_lens.verify import VerifyArguments as TunedLensArguments
    from .tuned_lens.verify import verify

    asked = TunedLensArguments(args.path, args.model, args.revision, args.dtype, args.device)
    return verify(asked, console)


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
            f"path: {args.path or args.cache!r} has caches of a subject loaded in several ways ({', '.join(dtypes)}); "
            "verify one at a time"
        )
    dtype = args.dtype or (dtypes[0] if dtypes else "float32")
    quantization = next(iter(quantizations), None)
    subject = load_subject_and_tokenizer(args.model, args.revision, dtype, quantization, device=args.device)
    return load_weights(subject, args.blocks)
