"""A client of OpenAI-compatible chat servers (vLLM, `transformers serve`): retries, answers and their thinking."""

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Self

import httpx2

from .chat import THINKING_KEYS
from .chat_prompts import Message, is_unicode
from .dataset_reading import cause_of

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
LIST_TIMEOUT = httpx2.Timeout(60.0, connect=CONNECT_SECONDS)  # `transformers serve` looks through the Hub's cache
LONGEST_DELAY, LONGEST_RETRY_AFTER = 60.0, 600.0  # seconds
TRANSIENT_STATUS = {408, 425, 429}  # and all from 500 on
# Not about one prompt where they come before any answer; later they may be, as in the 403 of a moderated prompt.
REFUSED_STATUS = {403, 404, 405, 422}


class Completion(NamedTuple):
    """A finished answer."""

    content: str
    thinking: str | None
    truncated: bool
    """Whether the answer was cut at the token limit (`finish_reason` "length")."""
    finish_reason: str
    prompt_tokens: int | None
    """As the server counts them; None where it does not say."""
    completion_tokens: int | None
    """Thinking included."""
    thinking_tokens: int | None


class TransientError(Exception):
    """Something that another try may mend; `kind` is what statistics count."""

    def __init__(self, kind: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class RejectedError(Exception):
    """The server's lasting no, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PromptFailedError(Exception):
    """One prompt was given up, after `tries` requests; `refused` where the server's no is a lasting one."""

    def __init__(self, message: str, tries: int, refused: bool = False) -> None:
        super().__init__(message)
        self.tries, self.refused = tries, refused


class ServerGoneError(RuntimeError):
    """No server listens any more."""


class ChatClient:
    """Completes conversations, any number at a time; an asynchronous context manager.

    Proxies are taken from the environment, as `NO_PROXY` allows. The API key is sent, and taken out of every message
    of the server that this class hands on.

    Args:
        base_url: of the API, such as `http://127.0.0.1:8000/v1`.
        model: name that the server knows the model by.
        parameters: of every request, such as `max_tokens` and `temperature`.
        api_key: sent as a bearer token; None for none.
        connections: kept open between requests; how many are under way is the caller's to bound.
        timeout: seconds for one request from its start to the end of its answer.
        max_tries: requests for one conversation before it is given up.
        retry_delay: seconds before the second try, doubled for each further one, up to `LONGEST_DELAY`; shortened by
            up to half at random, so that the tries of many conversations do not come together.

    Attributes:
        retries: how often a request was repeated, by cause.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        parameters: Mapping[str, Any],
        *,
        api_key: str | None = None,
        connections: int = 64,
        timeout: float = 600.0,
        max_tries: int = 5,
        retry_delay: float = 1.0,
    ) -> None:
        self.base_url, self.model, self.parameters = base_url.rstrip("/"), model, dict(parameters)
        self.timeout, self.max_tries, self.retry_delay = timeout, max_tries, retry_delay
        self.retries: Counter[str] = Counter()
        self._api_key = api_key
        self._answered = self._shown = False
        self._http = httpx2.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.__aexit__(*error)

    async def check(self) -> None:
        """Asks the server for its models, and for one token if it does not list this one.

        Raises:
            ValueError: if there is no server, it is of another kind, it refuses the key, or does not know the model.
        """
        try:
            # On a connection of its own: uvicorn cuts it after an error, when the next request may be under way.
            response = await self._http.get("models", timeout=LIST_TIMEOUT, headers={"Connection": "close"})
        except httpx2.RequestError as error:
            cause = self._without_key(cause_of(error))
            raise ValueError(
                f"base_url: no server answers at {self.base_url} ({cause}); start one, say: vllm serve {self.model}"
            ) from error
        if response.status_code in (401, 403):
            raise self._refused(RejectedError(response.status_code, self._said(response)))
        listed = models_from(response)
        if self.model in listed:
            return
        # `transformers serve` lists the Hub's cache, not the folder it serves, and fails where there is no cache.
        probe = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            await self._post(probe)
        except (TransientError, RejectedError) as error:
            if isinstance(error, RejectedError) and error.status in (401, 403):
                raise self._refused(error) from error
            models = ", ".join(listed) or f"no models (status {response.status_code})"
            raise ValueError(
                f"model: the server at {self.base_url} lists {models}, and gave no answer for {self.model!r} "
                f"({error}); pass --model as the server names it, and --base_url up to /v1"
            ) from error

    async def complete(self, messages: Sequence[Message], seed: int | None = None) -> Completion:
        """The model's answer, after as many tries as it takes.

        Args:
            messages: the conversation, which ends with the user's turn.
            seed: of the sampling; None leaves it to the server.

        Raises:
            PromptFailedError: if this conversation is given up.
            ServerGoneError: if no server listens any more.
            ValueError: if the server refuses the key, or the kind of request before it has answered any.
        """
        body = {"model": self.model, "messages": messages, **self.parameters}
        if seed is not None:
            body["seed"] = seed
        tries = 0
        while True:
            tries += 1
            try:
                answer = await self._post(body)
                self._show_first(answer)
                completion = completion_from(answer)
            except RejectedError as error:
                if error.status == 401 or (error.status in REFUSED_STATUS and not self._answered):
                    raise self._refused(error) from error
                raise PromptFailedError(str(error), tries, refused=True) from error
            except TransientError as error:
                if tries >= self.max_tries:
                    raise await self._last_failure(error) from error
                self.retries[error.kind] += 1
                await asyncio.sleep(retry_seconds(tries, self.retry_delay, error.retry_after))
            else:
                self._answered = True
                return completion

    def _show_first(self, answer: Any) -> None:
        """Logs the server's first output as it came: whether the thinking is where it should be shows there."""
        if not self._shown:
            self._shown = True
            logger.info("first output of the server: %s", self._without_key(json.dumps(answer, ensure_ascii=False)))

    async def _last_failure(self, error: TransientError) -> Exception:
        """What a conversation's last try comes to: its own failure, or that of the whole run."""
        if error.kind == "connection":
            try:
                await self._http.get("models", timeout=LIST_TIMEOUT)
            except httpx2.ConnectError:
                return ServerGoneError(f"no server answers at {self.base_url} any more")
            except httpx2.RequestError:
                pass  # slow, but there
        return PromptFailedError(str(error), self.max_tries)

    async def _post(self, body: Mapping[str, Any]) -> Any:
        """The server's JSON for one request.

        Raises:
            TransientError, RejectedError: as their names say.
        """
        try:
            async with asyncio.timeout(self.timeout):
                response = await self._http.post("chat/completions", json=body)
        except TimeoutError as error:
            raise TransientError("time-out", f"no answer within {self.timeout:g} seconds") from error
        except httpx2.RequestError as error:
            raise TransientError("connection", self._without_key(cause_of(error))) from error
        if not response.is_success:
            status, message = response.status_code, f"status {response.status_code}: {self._said(response)}"
            if status in TRANSIENT_STATUS or status >= 500:
                raise TransientError(f"status {status}", message, retry_after_seconds(response.headers))
            raise RejectedError(status, message)
        try:
            return response.json()
        except ValueError as error:
            raise TransientError("malformed", f"the answer is not JSON ({error})") from error

    def _refused(self, error: RejectedError) -> ValueError:
        if error.status in (401, 403):
            given = "the API key" if self._api_key else "a request without an API key"
            return ValueError(
                f"api_key_variable: the server refuses {given} ({error}); put the key into the environment variable "
                "that --api_key_variable names"
            )
        return ValueError(f"base_url: {self.base_url} refuses the first request ({error})")

    def _said(self, response: httpx2.Response) -> str:
        """The first 200 characters of what the server says of an error, on one line and without the key."""
        return self._without_key(" ".join(response.text.split()))[:200]

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "<API key>") if self._api_key else text


def models_from(response: httpx2.Response) -> list[str]:
    """The names that a server lists; none if its answer is no list of models."""
    try:
        return [str(entry["id"]) for entry in response.raise_for_status().json()["data"]]
    except (httpx2.HTTPStatusError, ValueError, KeyError, TypeError):
        return []


def completion_from(answer: Any) -> Completion:
    """Reads a chat completion.

    Raises:
        TransientError: if it is no chat completion, is not finished, or says nothing.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise TransientError("malformed", "an answer without choices")
    finish_reason, content = choice.get("finish_reason"), message.get("content") or ""
    if finish_reason not in ("stop", "length"):
        raise TransientError("unfinished", f"an answer with finish_reason {finish_reason!r}")
    if not isinstance(content, str):
        raise TransientError("malformed", f"an answer whose content is of type {type(content).__name__}")
    fields = (message.get(name) for name in THINKING_KEYS)
    thinking = next((text.strip() for text in fields if isinstance(text, str) and text.strip()), None)
    if thinking is None:
        thinking, content = split_thinking(content)
    if not is_unicode(content + (thinking or "")):
        raise TransientError("malformed", "an answer with half of a surrogate pair")
    truncated = finish_reason == "length"
    if not content.strip() and not (truncated and thinking):
        raise TransientError("empty", "an empty answer")
    return Completion(content, thinking, truncated, finish_reason, *usage_of(answer))


def split_thinking(content: str) -> tuple[str | None, str]:
    """Divides an answer into its thinking (None for none) and the rest.

    The thinking stands in a <think>...</think> block at the start. The opening tag is missing where the chat template
    already wrote it, and the closing tag where the answer was cut.
    """
    before, closed, after = content.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    if not opened and (not closed or "<think>" in before):
        return None, content
    return before.lstrip().removeprefix("<think>").strip() or None, after.lstrip()


def usage_of(answer: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Tokens of the prompt, of the completion and of the thinking in it, each None where the server does not say."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    details = details if isinstance(details, dict) else {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("reasoning_tokens"))
    prompt, completion, thinking = (count if isinstance(count, int) else None for count in counts)
    return prompt, completion, thinking


def retry_seconds(tries: int, first_delay: float, retry_after: float = 0.0) -> float:
    """Seconds to wait after `tries` tries: exponential with jitter, and never less than the server asks for."""
    delay = min(first_delay * 2 ** (tries - 1), LONGEST_DELAY)
    return max(delay * random.uniform(0.5, 1.0), min(retry_after, LONGEST_RETRY_AFTER))


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """What a `Retry-After` header asks for, in seconds or as a date (RFC 9110, section 10.2.3); 0 without one."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
