"""`consistency-lens generate-chat`: complete prompts through an OpenAI-compatible server and keep the chats."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, Group


def main(argv: Sequence[str] | None = None) -> int:
    """Completes prompts; prints the first answer, the lengths and where all lie. Returns the exit code.

    It is 1 where prompts failed, which another try may mend, or none was answered; prompts that the server refuses for
    good are counted apart and leave it 0.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..data.chat_client import ServerGoneError
    from ..data.chat_generation import ChatGenerationArguments, generate_chat
    from .command import DONE, FAILED, run_command
    from .parser import parse_arguments

    def work(console: "Console") -> int:
        (arguments,) = parse_arguments((ChatGenerationArguments,), argv, "generate-chat")
        try:
            with logging_redirect_tqdm():
                statistics = generate_chat(arguments, on_first=lambda row: print_example(console, row))
        except (ServerGoneError, OSError, KeyboardInterrupt) as error:
            kept = "what was answered is kept, run the same command again to go on"
            raise ServerGoneError(f"{str(error) or 'interrupted'}; {kept}") from error
        console.print(statistics_report(statistics))
        files = "train/messages.parquet, messages.jsonl; counts: stats.json"
        console.print(f"The data set lies in {arguments.output_dir} ({files})", markup=False, soft_wrap=True)
        if statistics["failed"] + statistics["skipped"]:
            console.print(unanswered(statistics["failed"], statistics["skipped"]), highlight=False, soft_wrap=True)
        return FAILED if statistics["failed"] or not statistics["answers"] else DONE

    return run_command(work, {ServerGoneError: FAILED})


def unanswered(failed: int, refused: int) -> str:
    """What is to be done about prompts without an answer."""
    text = f"failures.jsonl has the prompts without an answer, and why: {failed:,} failed, {refused:,} refused"
    if failed:
        text += "; run the same command again to try them again"
    if refused:
        text += "; those that the server refuses need another text or other settings"
    return text


def print_example(console: "Console", row: Mapping[str, Any]) -> None:
    """Prints a whole conversation, above the progress bar."""
    from rich.text import Text
    from tqdm.auto import tqdm

    text = Text(f"The first answer (id {row['id']}, finish_reason {row['finish_reason']}):\n")
    for message in row["messages"]:
        for part in ("thinking", "content"):
            if part in message:
                label = message["role"] if part == "content" else f"{message['role']}, thinking"
                text.append(f"[{label}]\n", style="bold").append(f"{message[part]}\n")
    with tqdm.external_write_mode():
        console.print(text, soft_wrap=True)


def statistics_report(statistics: Mapping[str, Any]) -> "Group":
    """What was answered, and how long it is in tokens."""
    from rich.console import Group
    from rich.text import Text

    from ..evaluation.report import rich_table

    run = statistics["this_run"]
    retries = ", ".join(f"{cause} {count}" for cause, count in run["retries"].items()) or "none"
    lines = [
        f"{statistics['answers']:,} of {statistics['prompts']:,} prompts answered by {statistics['model']}: "
        f"{statistics['with_thinking']:,} with thinking, {statistics['truncated']:,} cut at max_tokens "
        f"({statistics['dropped']:,} of them dropped); {statistics['failed']:,} failed, "
        f"{statistics['skipped']:,} refused by the server",
        f"This run: {run['answers']:,} answers in {run['seconds']:.0f} s, {run['answers_per_second']:.2f} answers/s, "
        f"{run['completion_tokens_per_second']:.0f} tokens/s; repeated requests: {retries}",
    ]
    columns = ("tokens", "counted by the", "examples", "mean", "median", "95%", "most")
    return Group(*map(Text, lines), rich_table(columns, length_rows(statistics["tokens"])))


def length_rows(tokens: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[tuple[str, ...]]:
    """A row for each part of an example, as the server and the tokenizer count it."""
    return [
        (part, counter, *(f"{lengths[name]:,.0f}" for name in ("count", "mean", "median", "p95", "max")))
        for counter, parts in tokens.items()
        for part, lengths in parts.items()
    ]
