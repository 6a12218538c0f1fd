"""`consistency-lens pull`: fetch published lenses or activation caches from the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .artifact_kinds import CACHE, LENS, TUNED_LENS, kind_of_repository

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class PullArguments:
    """What is fetched, and where it goes."""

    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name; datasets/user/name for a data set."})
    path: str = field(
        default="",
        metadata={
            "help": "With --lens or --split the folder of that one, as of a repository that holds one alone; else "
            "each goes to a folder of its name in it."
        },
    )
    lens: str | None = field(
        default=None, metadata={"help": "One of a collection, as `list` shows it; default: all of them."}
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "Tag of a release, commit or branch; default: main, or of lenses the newest finished release."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Of a cache, such as train; default: all."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        examples = {"repo": "user/name", "path": "lenses/name"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches; prints what is where. Returns the exit code, 3 for a file that is not what was published."""
    from ..data.cache_check import VerificationError
    from .command import NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((PullArguments,), argv, "pull")
        for line in pull(args):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work, {VerificationError: NOT_VERIFIED})


def pull(args: PullArguments) -> list[str]:
    """Fetches by the kind of what a repository holds; returns what is said of it.

    Raises:
        ValueError: for a user's mistake, also a repository that holds nothing of this library.
        VerificationError: if a file is not what was published.
        OSError: if the Hub cannot be reached, or a file cannot be written.
    """
    args.repo, kind = kind_of_repository(args.repo)
    if args.lens is not None and kind == CACHE:
        raise ValueError(f"lens: got {args.lens!r}, but {args.repo!r} holds no lenses; leave it out")
    if args.split is not None and kind != CACHE:
        raise ValueError(f"split: got {args.split!r}, but {args.repo!r} holds no activation cache; leave it out")
    return {LENS: _pull_lenses, TUNED_LENS: _pull_tuned_lenses, CACHE: _pull_cache}[kind](args)


def _pull_lenses(args: PullArguments) -> list[str]:
    from ..hub.lens_pull import pull_lenses

    pulled = pull_lenses(args.repo, args.path, lens=args.lens, revision=args.revision, progress=not args.disable_tqdm)
    lines = [
        f"{lens.name} {lens.entry.release} of commit {lens.commit}{_here(lens.is_new)}; {lens.path}" for lens in pulled
    ]
    if any(name.endswith(".py") for lens in pulled for name in lens.entry.files):
        lines.append("Python code came with it, and none was run; it runs with trust_remote_code=True alone.")
    return lines


def _pull_tuned_lenses(args: PullArguments) -> list[str]:
    from ..tuned_lens.download import download_tuned_lens

    pulled = download_tuned_lens(
        args.repo, args.path, model=args.lens, revision=args.revision, progress=not args.disable_tqdm
    )
    return [
        f"{lens.model} {lens.tl_version} of commit {lens.commit}{_here(lens.is_new)}; {lens.path}" for lens in pulled
    ]


def _pull_cache(args: PullArguments) -> list[str]:
    from ..hub.cache_pull import pull_cache

    pulled = pull_cache(args.repo, args.path, revision=args.revision, split=args.split, progress=not args.disable_tqdm)
    return [
        f"{cache.split}: {cache.rows:,} rows of commit {cache.commit}{_here(cache.is_new)}; {cache.path}"
        for cache in pulled
    ]


def _here(is_new: bool) -> str:
    return "" if is_new else ", here already"
