"""Chats written by a served model: each prompt completed once and kept at once, the whole in the prompts' order.

A folder of answers holds
  - `answers.jsonl`: the log, one finished answer a line in the order of their coming: `id`, `messages`,
    `finish_reason` and the server's numbers of tokens;
  - `train/messages.parquet` and `messages.jsonl`: `messages` alone (of the assistant's also `thinking`), in the order
    of the prompts, written at the end. `consistency-lens tokenize` reads either of them, or the whole folder;
  - `failures.jsonl`: the prompts that failed, try after try, and those that the server refused, and why; the next run
    tries all of them again;
  - `generation.json`: the arguments; `stats.json`: counts, token lengths and speed.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import __version__
from ..atomic_write import write_json
from .chat_answers import AnswerFiles, Row
from .chat_client import ChatClient, PromptFailedError, ServerGoneError
from .chat_prompts import read_prompts
from .chat_statistics import statistics_of
from .dataset_reading import cause_of

logger = logging.getLogger(__name__)

SETTINGS_FILE, STATISTICS_FILE = "generation.json", "stats.json"
API_KEY_VARIABLE = "OPENAI_API_KEY"
FAILED_IN_A_ROW = 20  # prompts, or twice as many as are under way: then the run ends
# What may change between a run and the next one on the same folder: where prompts lie (each is compared with its
# answer), how many are completed, and how answers are got.
OPERATION = {
    *("prompts", "output_dir", "max_examples", "tokenizer", "drop_truncated", "base_url", "api_key_variable"),
    *("concurrency", "max_tries", "retry_delay", "request_timeout", "disable_tqdm"),
}
OWN_PARAMETERS = {"model", "messages", "seed", "max_tokens", "temperature", "top_p", "reasoning_effort", "n", "stream"}


@dataclass
class ChatGenerationArguments:
    """What to complete, by which server, and how."""

    prompts: str = field(
        default="", metadata={"help": "A .jsonl or .txt file (one prompt a line), a .parquet file, or a Hub dataset."}
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the answers; a run that was killed goes on."})
    model: str = field(default="", metadata={"help": "Name that the server knows the model by."})
    base_url: str = field(
        default="http://127.0.0.1:8000/v1", metadata={"help": "Of an OpenAI-compatible server, up to /v1."}
    )

    prompt_column: str | None = field(
        default=None, metadata={"help": "Texts or lists of messages; default: prompt, or else messages."}
    )
    prompts_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset."})
    prompts_split: str = field(default="train", metadata={"help": "Split of a dataset, such as validation."})
    prompts_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "First message of the conversations that have no system message."}
    )
    max_examples: int | None = field(default=None, metadata={"help": "Complete only so many prompts, the first ones."})

    max_tokens: int = field(default=4096, metadata={"help": "Most tokens of an answer, thinking included."})
    temperature: float | None = field(default=None, metadata={"help": "Default: the server's."})
    top_p: float | None = field(default=None, metadata={"help": "Default: the server's."})
    reasoning_effort: str | None = field(
        default=None, metadata={"help": "How long gpt-oss and its like think: low, medium or high."}
    )
    extra_body: dict | str | None = field(
        default=None,
        metadata={"help": 'More fields of a request, as JSON: {"chat_template_kwargs": {"enable_thinking": true}}.'},
    )
    seed: int | None = field(
        default=0,
        metadata={"help": "Every prompt is sampled with a seed of its own, made from this; null in a recipe: none."},
    )
    drop_truncated: bool = field(
        default=False, metadata={"help": "Leave conversations whose answer was cut at max_tokens out of the data set."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder; counts the texts' tokens, beside what the server counts."},
    )

    concurrency: int = field(default=64, metadata={"help": "Requests under way at a time."})
    max_tries: int = field(default=5, metadata={"help": "Requests for one prompt before it is given up."})
    retry_delay: float = field(
        default=1.0, metadata={"help": "Seconds before the second try, doubled for each further one."}
    )
    request_timeout: float = field(default=600.0, metadata={"help": "Seconds for one request and its answer."})
    api_key_variable: str = field(
        default=API_KEY_VARIABLE, metadata={"help": "Environment variable with the API key, if the server wants one."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        examples = {"prompts": "prompts.jsonl", "output_dir": "data/answers", "model": "Qwen/Qwen3-8B"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass one, such as --{name} {example}")
        for name in ("max_examples", "max_tokens", "concurrency", "max_tries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.request_timeout <= 0 or self.retry_delay < 0:
            raise ValueError(
                f"request_timeout must be above 0 and retry_delay 0 or more (seconds), got {self.request_timeout} "
                f"and {self.retry_delay}"
            )
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got {self.top_p}")
        check_base_url(self.base_url)
        self.extra_body = parse_extra_body(self.extra_body)

    def parameters(self) -> dict[str, Any]:
        """The fields of every request but the model, the conversation and the seed."""
        names = ("max_tokens", "temperature", "top_p", "reasoning_effort")
        extra: Any = self.extra_body or {}
        return {name: value for name in names if (value := getattr(self, name)) is not None} | extra


def check_base_url(base_url: str) -> None:
    """Refuses an address that is none, or that carries a secret: it is written beside the answers."""
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError("base_url: cannot be read; pass an address like http://127.0.0.1:8000/v1") from error
    if url.userinfo or url.query:
        raise ValueError("base_url: has a user name or a query; put an API key into the environment instead")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url: got {base_url!r}; pass an address like http://127.0.0.1:8000/v1")


def parse_extra_body(given: dict | str | None) -> dict[str, Any] | None:
    """The fields that `--extra_body` adds to a request, from JSON or, in a recipe, a mapping.

    Raises:
        ValueError: if it is no JSON object, or has a field that an argument sets.
    """
    if given is None:
        return None
    try:
        fields = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"extra_body: got {given!r}, which is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"extra_body: must be a JSON object, got {given!r}")
    taken = sorted(fields.keys() & OWN_PARAMETERS)
    if taken:
        raise ValueError(f"extra_body: {taken[0]!r} cannot be set there; leave it out, or use the flag of that name")
    return fields


def api_key_from(variable: str) -> str | None:
    """The API key in an environment variable; None where the default one is not set.

    Raises:
        ValueError: if there is no such variable, or it holds no key; what was given is not repeated, for it may be the
            key itself.
    """
    key = os.environ.get(variable, "").strip()
    if not key and variable == API_KEY_VARIABLE:
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("api_key_variable: names no environment variable with a key; pass its name, not the key")
    return key


def generate_chat(args: ChatGenerationArguments, on_first: Callable[[Row], None] | None = None) -> dict[str, Any]:
    """Completes every prompt that has no answer yet and writes the answers, see this module; returns the statistics.

    Args:
        on_first: called with the first answer of this run, as soon as it is there.

    Raises:
        ValueError: for a user's mistake, before any long work: prompts that cannot be read, a folder made with other
            settings, a server that is not there, refuses the key, or does not know the model.
        ServerGoneError: if the server stops answering, or fails prompt after prompt; what was answered is kept, and
            the same call goes on.
        OSError: if an answer cannot be written.
    """
    prompts = read_prompts(
        args.prompts,
        args.prompt_column,
        config=args.prompts_config,
        split=args.prompts_split,
        revision=args.prompts_revision,
        system_prompt=args.system_prompt,
        limit=args.max_examples,
    )
    api_key = api_key_from(args.api_key_variable)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    folder = Path(args.output_dir)
    check_settings(folder, args)
    retries: Counter[str] = Counter()
    started = time.perf_counter()
    with only_writer(folder), AnswerFiles(folder, prompts) as answers:
        if answers.waiting():
            retries = asyncio.run(complete_all(args, api_key, answers, on_first))
        seconds = time.perf_counter() - started
        answers.write_messages(args.drop_truncated)
        counts = statistics_of(answers, args.drop_truncated, tokenizer, args.disable_tqdm)
    run = {
        "answers": answers.added,
        "seconds": seconds,
        "answers_per_second": answers.added / seconds,
        "completion_tokens_per_second": answers.added_tokens / seconds,
        "retries": dict(retries),
    }
    statistics = {"model": args.model, **counts, "this_run": run}
    write_json(folder / STATISTICS_FILE, statistics)
    return statistics


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or folder; a ValueError if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer: cannot load that of {name!r} ({cause_of(error)}); pass a Hub id or a folder"
        ) from error


def check_settings(folder: Path, args: ChatGenerationArguments) -> None:
    """Refuses a folder whose answers were made with other settings."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    for name, value in asdict(args).items():
        if name not in OPERATION and found.get(name) != value:
            raise ValueError(
                f"output_dir: {str(folder)!r} was made with {name} {found.get(name)!r}, now it is {value!r}; choose "
                "another folder or delete that one"
            )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps a second process from writing to it at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"output_dir: another process is writing to {str(folder)!r}; wait for its end, or choose another folder"
        ) from error


def request_seed(seed: int | None, prompt_id: str) -> int | None:
    """A 31-bit seed for one prompt: its answer depends neither on the order of the prompts nor on their number."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt_id}".encode()).digest()[:4], "big") >> 1


def make_client(args: ChatGenerationArguments, api_key: str | None) -> ChatClient:
    return ChatClient(
        args.base_url,
        args.model,
        args.parameters(),
        api_key=api_key,
        connections=args.concurrency,
        timeout=args.request_timeout,
        max_tries=args.max_tries,
        retry_delay=args.retry_delay,
    )


class FailureStreak:
    """Prompts that failed one after the other: a server that hangs or is broken would fail all of them, each slowly.

    Args:
        most: how many end the run.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.length = 0

    def count(self, error: PromptFailedError) -> None:
        """Counts a failure; a prompt that the server refused says nothing of the next.

        Raises:
            ServerGoneError: if they are too many.
        """
        self.length += not error.refused
        if self.length >= self.most:
            raise ServerGoneError(f"{self.length} prompts in a row have failed ({error})") from error

    def end(self) -> None:
        """A prompt was answered."""
        self.length = 0


async def complete_all(
    args: ChatGenerationArguments,
    api_key: str | None,
    answers: AnswerFiles,
    on_first: Callable[[Row], None] | None,
) -> Counter[str]:
    """Completes the waiting prompts, `concurrency` at a time; returns how often requests were repeated, by cause."""
    async with make_client(args, api_key) as client:
        await client.check()
        started = time.perf_counter()
        write_json(Path(args.output_dir) / SETTINGS_FILE, {"arguments": asdict(args), "version": __version__})
        waiting, total = answers.waiting(), len(answers.prompts)
        initial, prompts = total - len(waiting), iter(waiting)
        streak = FailureStreak(max(FAILED_IN_A_ROW, 2 * args.concurrency))
        with tqdm(total=total, initial=initial, desc="answers", unit="answer", disable=args.disable_tqdm) as bar:

            async def work() -> None:
                for prompt in prompts:
                    try:
                        completion = await client.complete(prompt.messages, request_seed(args.seed, prompt.id))
                    except PromptFailedError as error:
                        answers.fail(prompt, error)
                        logger.warning("prompt %s is left out after %d tries: %s", prompt.id, error.tries, error)
                        streak.count(error)
                    else:
                        streak.end()
                        row = answers.add(prompt, completion)
                        if on_first is not None and answers.added == 1:
                            on_first(row)
                    bar.update()
                    speed = f"{answers.added_tokens / (time.perf_counter() - started):.0f} tokens/s"
                    lost = f"failed {answers.failed}, refused {answers.skipped}, retries {client.retries.total()}"
                    bar.set_postfix_str(f"{speed}, {lost}", refresh=False)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(args.concurrency, len(waiting))):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from errors
    return client.retries
