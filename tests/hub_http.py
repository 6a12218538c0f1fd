"""The HTTP of a Hub on loopback: what is asked and answered, and the faults on the way."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from hub_faults import Fault

if TYPE_CHECKING:
    from hub_server import HubServer


class Reply(NamedTuple):
    """What the server answers."""

    body: Any = b""
    """JSON, or bytes that are sent as they are."""
    status: int = 200
    headers: Mapping[str, str] = {}


class Request(NamedTuple):
    """What a client asks."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def error(status: int, code: str, message: str) -> Reply:
    """An error as the Hub words it: a code for the client, a message for people."""
    return Reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


def ranged(content: bytes, wanted: str | None, headers: dict[str, str]) -> Reply:
    """The bytes that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if match is None:
        return Reply(content, 200, headers)
    start, end = int(match[1]), int(match[2] or len(content) - 1)
    if start >= len(content):
        return Reply(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    part = content[start : end + 1]
    span = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    return Reply(part, 206, {**headers, "Content-Range": span})


FAILURES: dict[Fault | None, Callable[["HubServer"], Reply]] = {
    Fault.ERROR: lambda hub: error(500, "", "Internal Error - We're working hard to fix this as soon as possible!"),
    Fault.BUSY: lambda hub: Reply({"error": "Too Many Requests"}, 429, {"Retry-After": str(hub.retry_after)}),
}


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that have gone, as those do that waited for too long."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    hub: "HubServer"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the client waits for each body

    def answer(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, self.received())
        if self.hub.closing.is_set():
            self.close_connection = True
            return
        fault = self.hub.fault_of(request.method, request.path)
        if fault is Fault.REFUSED:
            self.close_connection = True
            return
        handle = self.hub.handle_late if fault is Fault.SLOW else self.hub.handle
        reply = FAILURES[fault](self.hub) if fault in FAILURES else handle(request)
        if fault is Fault.LOST:
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        if fault is Fault.CORRUPT and isinstance(reply.body, bytes) and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        kind = "application/octet-stream" if isinstance(reply.body, bytes) else "application/json"
        self.send_response(reply.status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is Fault.CUT:
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def received(self) -> bytes:
        """The body, also where it comes in chunks because its length was not known."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""
