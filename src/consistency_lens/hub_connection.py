"""Talking to the Hugging Face Hub: its many errors as two, each one line that says what to do, and no endless wait."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, parse_ratelimit_headers

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (400, 422)
BUSY = (429, 503)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# Seconds that the Hub may ask to wait for: it counts requests in windows of five minutes.
LONGEST_WAIT = 300
# Seconds of silence in the middle of an answer that are waited for; the client itself would wait for ever.
PATIENCE = 60.0


class HubError(OSError):
    """The Hub cannot be reached, or fails; the same call may do later."""


@contextmanager
def asking_hub(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` inside the `with` block into errors of one line, without a token in them.

    Inside it no request waits for an answer longer than `PATIENCE`, nor longer than `LONGEST_WAIT` because the Hub
    says so. How often one is tried again is for `huggingface_hub` to say: at most five times.

    Raises:
        ValueError: where the user can mend it: no such repository or revision, a token that is missing, wrong or
            without the right, something that the Hub does not take.
        HubError: where the Hub cannot be reached, or fails.
        OSError: where there is no room on the disk here.
    """
    try:
        with _bounded_waits():
            yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise ValueError(f"hub: no token to write to {repo!r} with; {LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"revision: {repo!r} has no {revision!r}; pass a commit, tag or branch of it") from error
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"repo: {repo!r} lacks a file that it names ({_asked(error)}); it is incomplete") from error
    except (HTTPError, OSError, EntryNotFoundError, RuntimeError) as error:
        # an upload in several threads wraps what went wrong in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise _readable(cause, repo) from error
    except json.JSONDecodeError as error:
        raise HubError(f"hub: {constants.ENDPOINT} answers with something that is no JSON; try again later") from error
    except ValueError as error:
        # what the Hub finds wrong with a card comes in several lines
        raise ValueError(f"hub: {' '.join(str(error).split())}") from error


@contextmanager
def _bounded_waits() -> Iterator[None]:
    """Sets the limits of the client that all calls share, until the outermost block ends."""
    client = get_session()
    hooks = client.event_hooks
    if _refuse_long_wait in hooks["response"]:
        yield
        return
    client.event_hooks = {
        "request": [*hooks["request"], _limit_silence],
        "response": [*hooks["response"], _refuse_long_wait],
    }
    try:
        yield
    finally:
        client.event_hooks = hooks


def _limit_silence(request: Any) -> None:
    """Sets the time-outs of a request that has none; some calls ask for that."""
    asked = request.extensions.get("timeout", {})
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {name: asked.get(name) or PATIENCE for name in names}


def _refuse_long_wait(response: Any) -> None:
    """Gives up where `huggingface_hub` would sleep for as long as the Hub likes."""
    wait = _asked_wait(response.headers) if response.status_code in BUSY else 0
    if wait > LONGEST_WAIT:
        raise HubError(
            f"hub: {constants.ENDPOINT} asks to wait for {wait:,} seconds ({response.status_code}); try again then"
        )


def _asked_wait(headers: Mapping[str, str]) -> int:
    limit = parse_ratelimit_headers(headers)
    after = headers.get("Retry-After", "").strip()
    return max(limit.reset_in_seconds if limit is not None else 0, int(after) if after.isdecimal() else 0)


def _asked(error: HfHubHTTPError) -> str:
    """The path of a request that failed."""
    return error.response.request.url.path


def _readable(error: BaseException, repo: str) -> Exception:
    if isinstance(error, HubError):
        return error
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return OSError(error.errno, f"no room on the disk for what comes from or goes to {repo!r}; make some")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = first_line(error)
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return ValueError(f"hub: {constants.ENDPOINT} does not take the token (401); {LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(f"repo: no {repo!r} on the Hub, or it is private; check the name, or {LOG_IN}")
    if status == 403:
        return ValueError(f"hub: the token has no right to do that in {repo!r} (403: {said}); {LOG_IN}")
    if status in REFUSED:
        return ValueError(f"hub: {constants.ENDPOINT} does not take this for {repo!r} ({status}: {said}); mend it")
    return HubError(f"hub: {constants.ENDPOINT} fails or cannot be reached ({said}); try again later")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    told = error.server_message if isinstance(error, HfHubHTTPError) and error.server_message else str(error)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
