"""The report's page with a server behind it: any text is read by the lens as it is asked for.

`GET /` is the page, `POST /api/explain` takes `{"text": "..."}` and answers with an explorer (see `explorer`). One
text is read at a time; a few wait, the others are told to come back (429, with Retry-After). What cannot be read is
refused in one line, as `{"error": "..."}`: 400 for what is no JSON in UTF-8, 413 for too large a body, 422 for a text
that is missing, empty or too long, 503 for one that took longer than it may.
"""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..explanation import text_ids
from ..modeling_consistency_lens import ConsistencyLensModel
from ..optional_packages import require
from .document import report_document
from .explorer import Explorer, read_texts
from .page import bounded, page_file, render_page
from .run_folder import FILES, RunFolder, read_run
from .serve_arguments import LOOPBACK
from .texts import title_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

LARGEST_BODY = 65_536  # bytes
RETRY_AFTER = 2  # seconds
LIVE_SCRIPT = "live.js"


class Busy(Exception):
    """As many texts wait as may."""


class Refused(ValueError):
    """A request that is not read, with the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ReadingQueue:
    """Reads one text after the other in a thread of its own.

    Args:
        read: the work on one text.
        length: texts that are read or wait at any time.
    """

    def __init__(self, read: Callable[[str], Any], length: int) -> None:
        self.read, self.length = read, length
        self.taken = 0
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lens")

    async def __call__(self, text: str, seconds: float) -> Any:
        """What `read` gives for a text.

        Raises:
            Busy: if as many texts wait as may.
            TimeoutError: if it is not there after so many seconds; a text that waits is then not read at all.
        """
        if self.taken >= self.length:
            raise Busy
        self.taken += 1
        loop = asyncio.get_running_loop()
        future = self.pool.submit(self.read, text)
        # a text that is being read keeps its place until it is, also when nobody waits for it any more
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        return await asyncio.wait_for(asyncio.wrap_future(_noted(future)), seconds)

    def _release(self) -> None:
        self.taken -= 1


def _noted(future: "Future[Any]") -> "Future[Any]":
    """The same future; an error that nobody waits for is not complained about."""
    future.add_done_callback(lambda of: of.cancelled() or of.exception())
    return future


def make_app(
    lens: ConsistencyLensModel,
    name: str,
    *,
    max_tokens: int = 256,
    queue: int = 16,
    seconds: float = 60.0,
    ablation: bool = True,
    hosts: tuple[str, ...] = LOOPBACK,
) -> "FastAPI":
    """The application.

    Args:
        lens: in evaluation mode, with its tokenizer and its subject.
        name: folder or Hub id of the lens; a folder's figures are shown beside the texts.
        max_tokens: of a text.
        queue: texts that are read or wait at any time.
        seconds: after which a text is given up.
        ablation: shade the words of explanations by what is lost without each.
        hosts: names that the server is asked by; a page of another name that leads here is turned away.

    Raises:
        ValueError: if fastapi is not installed.
    """
    require("fastapi", "serve", "serve")
    from fastapi import FastAPI, Request
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse

    def read(text: str) -> Explorer:
        ids = (title_of(text), checked_ids(lens, text, max_tokens))
        return read_texts(lens, [ids], source="Your text", max_tokens=max_tokens, ablation=ablation)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    reading, page = ReadingQueue(read, queue), live_page(name, max_tokens)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.get("/", include_in_schema=False)
    async def show() -> Any:
        return HTMLResponse(page)

    @app.post("/api/explain")
    async def explain(request: Request) -> Any:
        try:
            answer = await reading(text_of(await body_of(request)), seconds)
        except Refused as error:
            return failure(error.status, str(error))
        except ValueError as error:
            return failure(422, str(error))
        except Busy:
            busy = f"{queue} texts are being read; try again in {RETRY_AFTER} seconds"
            return failure(429, busy, {"Retry-After": str(RETRY_AFTER)})
        except TimeoutError:
            return failure(503, f"it took longer than {seconds:g} seconds; pass a shorter text")
        return json_response(200, answer)

    return app


def live_page(name: str, max_tokens: int) -> str:
    """The page: the report of the lens's folder if it is one, and a place to type into."""
    folder = Path(name)
    is_run = any((folder / file).is_file() for file in FILES)
    document: dict[str, Any] = {**report_document(read_run(folder) if is_run else RunFolder(path=folder))}
    document["live"] = {"max_tokens": max_tokens}
    return render_page(document, scripts=[page_file(LIVE_SCRIPT)], connects=True)


async def body_of(request: "Request") -> bytes:
    """The body of a request.

    Raises:
        Refused: if it is too large; no more than that is read.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"the request has more than {LARGEST_BODY:,} bytes; pass a shorter text")
    return body


def text_of(body: bytes) -> str:
    """The text of a request.

    Raises:
        Refused: if it is no JSON, or has no text.
    """
    try:
        content = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(400, 'the request is no JSON in UTF-8; send {"text": "..."}') from error
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise Refused(422, 'the request has no text; send {"text": "..."}')
    return text


def checked_ids(lens: ConsistencyLensModel, text: str, max_tokens: int) -> list[int]:
    """A text's tokens.

    Raises:
        ValueError: if there are none, or too many.
    """
    ids = text_ids(lens, text)[0]
    if len(ids) > max_tokens + 1:
        raise ValueError(f"the text has {len(ids)} tokens, {max_tokens} are read; pass a shorter one")
    return ids


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> "Response":
    return json_response(status, {"error": message}, headers)


def json_response(status: int, content: Any, headers: dict[str, str] | None = None) -> "Response":
    """JSON in ASCII, without NaN."""
    from starlette.responses import Response

    body = json.dumps(bounded(content), ensure_ascii=True, allow_nan=False)
    return Response(body, status, headers, media_type="application/json")
