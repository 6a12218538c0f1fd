"""A text read by a saved lens: the work of `consistency-lens explain`."""

from dataclasses import dataclass, field
from pathlib import Path

from ..explanation import Explanation
from .saved_lens import ReadingArguments, load_lens


@dataclass
class ExplainArguments(ReadingArguments):
    """Which text is read, with which lens."""

    text: str = field(default="", metadata={"help": "The text; it may also stand first, without its flag."})
    file: str | None = field(default=None, metadata={"help": "A UTF-8 file with the text, in place of it."})
    positions: list[int] | None = field(
        default=None, metadata={"help": "Tokens to read, BOS being 0, -1 the last; default: all after BOS."}
    )
    json: bool = field(default=False, metadata={"help": "JSON in place of a table."})

    def __post_init__(self) -> None:
        if bool(self.text) == (self.file is not None):
            raise ValueError(
                f"text: got {'two, as an argument and in a file; pass one' if self.text else 'none; pass it'}, e.g. "
                'consistency-lens explain "Once upon a time" --lens outputs/tiny_stories'
            )
        super().__post_init__()


def explain_with(args: ExplainArguments) -> Explanation:
    """Loads the lens and explains the text.

    Raises:
        ValueError: if the lens or the file cannot be read, or the text is empty or too long for the subject.
    """
    text = args.text if args.file is None else read_text(args.file)
    return load_lens(args, args.verify_base).explain(text, positions=args.positions)


def read_text(file: str) -> str:
    """The text of a file, without the end of its last line.

    Raises:
        ValueError: if it is not there, or no UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file: cannot read {file!r}; pass a text file in UTF-8") from error
