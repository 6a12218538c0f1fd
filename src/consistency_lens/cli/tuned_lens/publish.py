"""`consistency-lens tuned-lens publish`: release tuned lenses in a data set on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class PublishArguments:
    """What is released, where, and what cannot be read from the model's own repository or folder."""

    lens: str = field(
        default="", metadata={"help": "Folder of a judged tuned lens, or one with such below it: all are released."}
    )
    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Only you may see it."})
    license: str | None = field(
        default=None, metadata={"help": "Of the model, such as apache-2.0; default: what the model's own card says."}
    )
    license_files: list[str] = field(
        default_factory=list, metadata={"help": "Texts of that licence; default: those that lie beside the model."}
    )
    tag: str | None = field(default=None, metadata={"help": "Of the release, vYYYY.MM.DD; default: today in UTC."})
    dry_run: bool = field(default=False, metadata={"help": "Write all that would be uploaded, list it, and stop."})

    def __post_init__(self) -> None:
        examples = {"lens": "tuned_lenses/gpt2", "repo": "user/tuned-lenses"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")
        # a config file may name one without brackets
        self.license_files = [self.license_files] if isinstance(self.license_files, str) else self.license_files


def main(argv: Sequence[str] | None = None) -> int:
    """Publishes; prints what was released. Returns the exit code, 3 for a lens that does not pass its checks."""
    from ...data.cache_check import VerificationError
    from ...tuned_lens.publish import publish_tuned_lens
    from ..command import NOT_VERIFIED, run_command
    from ..parser import parse_arguments
    from ..push import told_of_tuned_lenses

    def work(console: "Console") -> None:
        (args,) = parse_arguments((PublishArguments,), argv, "tuned-lens publish")
        published = publish_tuned_lens(
            args.lens,
            args.repo,
            private=args.private,
            license=args.license,
            license_files=args.license_files,
            tag=args.tag,
            dry_run=args.dry_run,
        )
        for line in told_of_tuned_lenses(published):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work, {VerificationError: NOT_VERIFIED})
