"""`consistency-lens tokenize`: a data set to tokens on disk, once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Tokenises a data set; prints its statistics and where the corpus lies. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..data.tokenization import TokenizationArguments, tokenize_corpus
        from ..evaluation.report import rich_table

        (args,) = parse_arguments((TokenizationArguments,), argv, "tokenize")
        corpus = tokenize_corpus(args)
        statistics = corpus.record["statistics"]
        console.print(rich_table(("documents", ""), document_rows(statistics)))
        console.print(rich_table(("split", "documents", "sequences", "rows", "tokens"), split_rows(statistics)))
        if corpus.is_new:
            where = f"The corpus lies in {corpus.path} (settings and statistics: tokenization.json)"
        else:
            where = f"The corpus of these settings lies in {corpus.path} already; nothing was done"
        console.print(where, markup=False, highlight=False, soft_wrap=True)

    return run_command(work)


def document_rows(statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each figure of the whole data set."""
    from ..data.corpus import DOCUMENT_SEPARATOR

    labels = {
        "rows": "rows read",
        "skipped_empty": "skipped, empty",
        "documents": "documents",
        "repeated": "of them repeated",
        "truncated": "of them cut at max_length",
        "dropped_tokens": "tokens dropped by that",
    }
    if statistics["thinking"]:
        labels |= {"thinking": "messages with thinking", "thinking_dropped": "of them dropped by the chat template"}
    if statistics["separator_lines"]:
        labels["separator_lines"] = f"lines with {DOCUMENT_SEPARATOR} and more"
    rows = [(label, f"{statistics[name]:,}") for name, label in labels.items()]
    lengths = statistics["document_tokens"]
    return rows + [(f"tokens of a document, {name}", f"{value:,.0f}") for name, value in lengths.items()]


def split_rows(statistics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Documents, sequences, rows and tokens of each split."""
    names = ("documents", "sequences", "rows", "tokens")
    return [(split, *(f"{statistics[split][name]:,}" for name in names)) for split in ("train", "validation")]
