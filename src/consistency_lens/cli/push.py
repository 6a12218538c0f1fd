"""`consistency-lens push`: publish what lies at a path on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LENS_TYPES = ("consistency_lens", "consistency_lens_decoder", "consistency_lens_encoder")


@dataclass
class PushArguments:
    """What is published, where, and what its card says that cannot be measured."""

    path: str = field(
        default="",
        metadata={"help": "Folder of an activation cache, or of the train and validation caches of one layer."},
    )
    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Only you may see it."})
    license: str | None = field(default=None, metadata={"help": "For the card, such as apache-2.0."})
    language: list[str] = field(default_factory=list, metadata={"help": "Of the text, for the card, such as en."})
    revision: str | None = field(default=None, metadata={"help": "Branch; made if it is not there. Default: main."})
    text: bool = field(default=True, metadata={"help": "Publish the decoded contexts beside the tokens."})
    dry_run: bool = field(default=False, metadata={"help": "Write all that would be uploaded, and stop."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        examples = {"path": "data/activations/stories/gpt2/layer_6", "repo": "user/name"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")
        # a config file may name one without brackets
        self.language = [self.language] if isinstance(self.language, str) else self.language


def main(argv: Sequence[str] | None = None) -> int:
    """Publishes; prints the address. Returns the exit code."""
    from ..data.cache_check import CacheVerificationError
    from .command import NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((PushArguments,), argv, "push")
        console.print(push(args), markup=False, highlight=False, soft_wrap=True)

    return run_command(work, {CacheVerificationError: NOT_VERIFIED})


def push(args: PushArguments) -> str:
    """Publishes by the kind of what lies at the path; returns what is said of it.

    Raises:
        ValueError: for a user's mistake, also a path at which nothing lies that can be published.
        CacheVerificationError: if a cache is not what its provenance says.
        OSError: if the Hub cannot be reached, or a file cannot be written.
    """
    from ..hub.cache_push import push_cache

    _check_kind(Path(args.path))
    pushed = push_cache(
        args.path,
        args.repo,
        private=args.private,
        license=args.license,
        language=args.language,
        revision=args.revision,
        text=args.text,
        dry_run=args.dry_run,
        progress=not args.disable_tqdm,
    )
    rows = ", ".join(f"{count:,} rows of {split}" for split, count in pushed.rows.items())
    if pushed.folder is not None:
        return f"Nothing was uploaded; what would be ({rows}) lies in {pushed.folder}"
    return f"{pushed.url} (commit {pushed.commit}): {rows}"


def _check_kind(path: Path) -> None:
    """Raises a ValueError for what is no folder, or the folder of something that cannot be published yet."""
    import json

    if not path.is_dir():
        raise ValueError(f"path: no folder at {str(path)!r}; pass the folder of an activation cache")
    config = path / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind in LENS_TYPES:
        raise ValueError(
            f"path: {str(path)!r} holds a lens ({kind}), and only activation caches can be published for now; pass "
            "the folder of a cache"
        )
    if kind is not None:
        raise ValueError(f"path: {str(path)!r} holds a model ({kind}); pass the folder of an activation cache")
