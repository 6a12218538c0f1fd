"""`consistency-lens tuned-lens download`: fetch published tuned lenses from the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class DownloadArguments:
    """What is fetched, and where it goes."""

    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name."})
    model: str | None = field(
        default=None, metadata={"help": "Whose lens, as `tuned-lens list` shows it; default: all of them."}
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "Tag of a release, commit or branch; default: main, or the newest finished release."},
    )
    output_dir: str = field(
        default="",
        metadata={
            "help": "Of the lens, or without --model of all; default: tuned_lenses/<model>, or the repo's name."
        },
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if not self.repo:
            raise ValueError("repo: got none; pass it, e.g. --repo user/tuned-lenses")
        if not self.output_dir:
            own, tree = self.repo.rpartition("/")[2], "tuned_lenses/"
            self.output_dir = own if self.model is None else tree + self.model.rpartition("/")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches; prints what is where. Returns the exit code, 3 for a file that is not what the index says."""
    from ...data.cache_check import VerificationError
    from ...tuned_lens.download import download_tuned_lens
    from ..command import NOT_VERIFIED, run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((DownloadArguments,), argv, "tuned-lens download")
        lenses = download_tuned_lens(
            args.repo, args.output_dir, model=args.model, revision=args.revision, progress=not args.disable_tqdm
        )
        for lens in lenses:
            state = "" if lens.is_new else ", here already"
            line = f"{lens.model} {lens.tl_version} of commit {lens.commit}{state}; {lens.path}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work, {VerificationError: NOT_VERIFIED})
