"""`consistency-lens pull`: fetch a published activation cache from the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class PullArguments:
    """What is fetched, and where it goes."""

    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name."})
    path: str = field(
        default="",
        metadata={"help": "With --split the folder of the cache; else each split goes to a folder of its name in it."},
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch; default: main."})
    split: str | None = field(default=None, metadata={"help": "Such as train; default: all."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        examples = {"repo": "user/name", "path": "data/activations/name"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches; prints what is where. Returns the exit code, 3 for a file that is not what its provenance says."""
    from ..data.cache_check import CacheVerificationError
    from ..hub.cache_pull import pull_cache
    from .command import NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((PullArguments,), argv, "pull")
        pulled = pull_cache(
            args.repo, args.path, revision=args.revision, split=args.split, progress=not args.disable_tqdm
        )
        for cache in pulled:
            state = "" if cache.is_new else ", here already"
            line = f"{cache.split}: {cache.rows:,} rows of commit {cache.commit}{state}; {cache.path}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work, {CacheVerificationError: NOT_VERIFIED})
