"""`consistency-lens push`: publish what lies at a path on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .artifact_kinds import CACHE, LENS, TUNED_LENS, kind_of_folder

if TYPE_CHECKING:
    from rich.console import Console

    from ..tuned_lens.publish import PublishedTunedLenses

# flags that say nothing to the other kinds
ONLY = {
    "name": (LENS,),
    "tag": (LENS, TUNED_LENS),
    "license_files": (LENS, TUNED_LENS),
    "language": (CACHE,),
    "revision": (CACHE,),
}


@dataclass
class PushArguments:
    """What is published, where, and what its card says that cannot be measured."""

    path: str = field(
        default="",
        metadata={
            "help": "Folder of a lens, a decoder or an encoder, or with several below it; of a judged tuned lens; of "
            "an activation cache, or of the train and validation caches of one layer."
        },
    )
    repo: str = field(default="", metadata={"help": "Id on the Hub, user/name or org/name; made if it is not there."})
    name: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a lens in the repository; default: its root, or in a collection the folder's name."
        },
    )
    tag: str | None = field(
        default=None, metadata={"help": "Of a release of lenses, vYYYY.MM.DD; default: today in UTC."}
    )
    private: bool = field(default=False, metadata={"help": "Only you, or your organisation, may see it."})
    license: str | None = field(
        default=None,
        metadata={"help": "For the card, such as apache-2.0; of a lens by default what its base model's card says."},
    )
    license_files: list[str] = field(
        default_factory=list, metadata={"help": "Texts of a lens's licence; default: those beside its base model."}
    )
    language: list[str] = field(
        default_factory=list, metadata={"help": "Of the text of a cache, for the card, such as en."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch of a cache; made if it is not there. Default: main."}
    )
    text: bool = field(default=True, metadata={"help": "Publish a cache's decoded contexts beside its tokens."})
    dry_run: bool = field(default=False, metadata={"help": "Write all that would be uploaded, list it, and stop."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        examples = {"path": "outputs/tiny_stories", "repo": "user/name"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")
        # a config file may name one without brackets
        self.language = [self.language] if isinstance(self.language, str) else self.language
        self.license_files = [self.license_files] if isinstance(self.license_files, str) else self.license_files


def main(argv: Sequence[str] | None = None) -> int:
    """Publishes; prints the address. Returns the exit code, 3 for what is not as its provenance says."""
    from ..data.cache_check import VerificationError
    from .command import NOT_VERIFIED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((PushArguments,), argv, "push")
        for line in push(args):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return run_command(work, {VerificationError: NOT_VERIFIED})


def push(args: PushArguments) -> list[str]:
    """Publishes by the kind of what lies at the path; returns what is said of it.

    Raises:
        ValueError: for a user's mistake, also a path at which nothing lies that can be published.
        VerificationError: if something is not what its provenance says.
        OSError: if the Hub cannot be reached, or a file cannot be written.
    """
    kind = kind_of_folder(Path(args.path))
    for flag, kinds in ONLY.items():
        if getattr(args, flag) and kind not in kinds:
            raise ValueError(f"{flag}: got {getattr(args, flag)!r}, but {args.path!r} holds a {kind}; leave it out")
    return {LENS: _push_lenses, TUNED_LENS: _push_tuned_lenses, CACHE: _push_cache}[kind](args)


def _push_lenses(args: PushArguments) -> list[str]:
    from ..hub.lens_push import push_lenses

    pushed = push_lenses(
        args.path,
        args.repo,
        name=args.name,
        private=args.private,
        license=args.license,
        license_files=args.license_files,
        tag=args.tag,
        dry_run=args.dry_run,
    )
    lines = []
    for name, entry in pushed.lenses.items():
        lines.append(
            f"{name}: {replaces(pushed.replaced.get(name))}, {entry.size:,} bytes in {len(entry.files)} files"
        )
    return [*lines, *_outcome(pushed.url, pushed.tag, pushed.commit, pushed.folder)]


def _push_tuned_lenses(args: PushArguments) -> list[str]:
    from ..tuned_lens.publish import publish_tuned_lens

    pushed = publish_tuned_lens(
        args.path,
        args.repo,
        private=args.private,
        license=args.license,
        license_files=args.license_files,
        tag=args.tag,
        dry_run=args.dry_run,
    )
    return told_of_tuned_lenses(pushed)


def told_of_tuned_lenses(pushed: "PublishedTunedLenses") -> list[str]:
    """What is said of tuned lenses that were published."""
    lines = [f"{model}: {replaces(before)}" for model, before in pushed.models.items()]
    return [*lines, *_outcome(pushed.url, pushed.tag, pushed.commit, pushed.folder)]


def _push_cache(args: PushArguments) -> list[str]:
    from ..hub.cache_push import push_cache

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
        return [*_files(pushed.folder), f"Nothing was uploaded; what would be ({rows}) lies in {pushed.folder}"]
    return [f"{pushed.url} (commit {pushed.commit}): {rows}"]


def replaces(version: str | None) -> str:
    """What a release means for what the repository had under a name."""
    return "new" if version is None else f"in place of that of {version}, which keeps its tag"


def _outcome(url: str, tag: str, commit: str | None, folder: Path | None) -> list[str]:
    if folder is not None:
        return [*_files(folder), f"Nothing was uploaded; what would be {tag} lies in {folder}"]
    return [f"{url}/tree/{tag} (commit {commit})"]


def _files(folder: Path) -> list[str]:
    """What would be uploaded, a line a file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [f"  {file.relative_to(folder)}, {file.stat().st_size:,} bytes" for file in files]
