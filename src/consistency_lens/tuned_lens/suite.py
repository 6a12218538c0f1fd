"""Prompts that lenses are compared on: factual ones with a known answer, and controls without one.

An answer becomes a token as it follows its prompt. Prompt and answer are tokenised together, a space between them
unless the prompt ends in white space or the answer begins with it, and what comes after the prompt's own tokens is the
answer's. (Where the two grow together, so that the prompt's own tokens are no longer there, the answer is tokenised
alone.) Of several tokens the first is taken, which is said. An answer of no tokens, or whose first one is the
tokenizer's unknown token, cannot be looked for: the prompt is then read as one without an answer, which is said too.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FACTUAL, CONTROL, FREE = "factual", "control", "free"
KINDS = {FACTUAL: "has one right answer", CONTROL: "has none", FREE: "a text of the user's"}
DEFAULT_SUITE = "default"
# suites that ship with the package: "default", and "stories" for models that know children's stories alone
SUITES = Path(__file__).parent / "suites"
FIELDS = ("id", "text", "answer", "kind")
SHOWN = 6  # prompts that a message names


@dataclass(frozen=True)
class Prompt:
    """One text that is read to its last token.

    Raises:
        ValueError: for a blank id, text or answer, an unknown kind, or a factual prompt without an answer.
    """

    id: str
    text: str
    answer: str | None = None
    kind: str = FREE

    def __post_init__(self) -> None:
        for name in FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "answer" and value is None):
                raise ValueError(f"prompt {self.id!r}: {name} must be text, got {value!r}")
            if value is not None and not value.strip():
                raise ValueError(f"prompt {self.id!r}: {name} is blank; write one, or leave the prompt out")
        if self.kind not in KINDS:
            raise ValueError(f"prompt {self.id!r}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == FACTUAL and self.answer is None:
            raise ValueError(f"prompt {self.id!r}: a factual prompt needs an answer; give it one, or kind {CONTROL!r}")


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt in the tokens of one model."""

    prompt: Prompt
    ids: tuple[int, ...]
    """S tokens, with those that the tokenizer puts before a text (BOS)."""
    answer_ids: tuple[int, ...]
    """The answer's tokens; none where there is no answer to look for."""

    @property
    def answer_id(self) -> int | None:
        """The token that stands for the answer: its first."""
        return self.answer_ids[0] if self.answer_ids else None

    @property
    def answer_is_one_token(self) -> bool | None:
        """Whether that token is the whole answer; None without one."""
        return len(self.answer_ids) == 1 if self.answer_ids else None


def read_suite(path: str | Path = DEFAULT_SUITE) -> list[Prompt]:
    """Reads a prompt suite.

    Args:
        path: "default" or "stories", each of 15 factual prompts and 5 controls; or a file. A `.json` list or `.jsonl`
            lines hold objects with `text` and, if wanted, `id` (else "prompt-1", ...), `answer` and `kind` (else
            "factual" with an answer, "control" without); any other file is a text with a prompt a line.

    Raises:
        ValueError: if there is no such file, it cannot be read, it has no prompts, or one of them is wrong.
    """
    shipped = {file.stem: file for file in sorted(SUITES.glob("*.json"))}
    path = shipped.get(str(path), Path(path))
    if not path.is_file():
        raise ValueError(
            f"suite: no file at {str(path)!r}; pass {' or '.join(shipped)}, or a .json, .jsonl or text file of prompts"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix not in (".json", ".jsonl"):
            return suite_of_texts([line for line in text.splitlines() if line.strip()], str(path))
        entries = json.loads(text) if path.suffix == ".json" else [json.loads(row) for row in text.splitlines() if row]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"suite: {str(path)!r} cannot be read ({error}); mend it") from error
    if not isinstance(entries, list):
        raise ValueError(f"suite: {str(path)!r} must hold a list of prompts, got {type(entries).__name__}")
    return checked([_prompt(number, entry) for number, entry in enumerate(entries, start=1)], str(path))


def suite_of_texts(texts: Sequence[str], place: str = "the command line") -> list[Prompt]:
    """A suite of texts without answers: "prompt-1", ...

    Raises:
        ValueError: if there are none, or one is blank.
    """
    return checked([Prompt(f"prompt-{number}", text) for number, text in enumerate(texts, start=1)], place)


def checked(prompts: Sequence[Prompt], place: str) -> list[Prompt]:
    """The prompts, if there are any and no two have one id.

    Raises:
        ValueError: otherwise.
    """
    if not prompts:
        raise ValueError(f"suite: {place} has no prompts; write at least one")
    name, times = Counter(prompt.id for prompt in prompts).most_common(1)[0]
    if times > 1:
        raise ValueError(f"suite: {place} has {times} prompts with the id {name!r}; give each its own")
    return list(prompts)


def suite_hash(prompts: Sequence[Prompt]) -> str:
    """Sha256 over a suite's prompts, whatever file they came in."""
    content = json.dumps([asdict(prompt) for prompt in prompts], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def tokenise_suite(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[TokenisedPrompt]:
    """A suite in the tokens of a model; the log names the answers that are not one token, or none.

    Args:
        context: the most tokens that the model reads; None for any number.

    Raises:
        ValueError: for a prompt of no tokens, or of more than the model reads.
    """
    tokenised = [TokenisedPrompt(prompt, *_token_ids(prompt, tokenizer)) for prompt in prompts]
    for of in tokenised:
        if not of.ids:
            raise ValueError(f"prompt {of.prompt.id!r}: {of.prompt.text!r} has no tokens; write another")
        if context is not None and len(of.ids) > context:
            raise ValueError(f"prompt {of.prompt.id!r}: it has {len(of.ids)} tokens, the model reads {context}")
    several = [of.prompt.id for of in tokenised if of.answer_is_one_token is False]
    if several:
        logger.warning("answers of several tokens, the first of which is looked for: %s", _some(several))
    lost = [of.prompt.id for of in tokenised if of.prompt.answer is not None and not of.answer_ids]
    if lost:
        logger.warning("answers that the tokenizer does not know, read as prompts without one: %s", _some(lost))
    return tokenised


def _prompt(number: int, entry: Any) -> Prompt:
    if not isinstance(entry, Mapping):
        raise ValueError(f"suite: prompt {number} must be an object with 'text', got {type(entry).__name__}")
    unknown = [key for key in entry if key not in FIELDS]
    if unknown:
        raise ValueError(f"suite: prompt {number} has the unknown key {unknown[0]!r}; known are {', '.join(FIELDS)}")
    if "text" not in entry:
        raise ValueError(f"suite: prompt {number} has no 'text'; write one")
    kind = CONTROL if entry.get("answer") is None else FACTUAL
    return Prompt(**{"id": f"prompt-{number}", "kind": kind, **entry})


def _token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a prompt and of its answer."""
    own = _plain(tokenizer, prompt.text)
    # what a tokenizer puts after a text (EOS) would end it
    whole = list(tokenizer(prompt.text)["input_ids"])
    before = next((n for n in range(len(whole) - len(own) + 1) if whole[n : n + len(own)] == own), 0)
    ids = (*whole[:before], *own)
    if prompt.answer is None or not own:
        return tuple(ids) if own else (), ()
    gap = "" if prompt.text[-1].isspace() or prompt.answer[0].isspace() else " "
    joined = _plain(tokenizer, prompt.text + gap + prompt.answer)
    answer = joined[len(own) :] if joined[: len(own)] == own else _plain(tokenizer, prompt.answer)
    known = bool(answer) and answer[0] != tokenizer.unk_token_id
    return ids, tuple(answer) if known else ()


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
