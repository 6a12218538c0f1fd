"""An OpenAI-compatible server on loopback that fails as it is told to."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

MODEL = "tiny/chat"
HANG = 60.0  # seconds that a hanging request is kept at most; the end of the server releases it


class Reply(NamedTuple):
    """What the server does with a request."""

    body: Any
    """JSON, or bytes that are sent as they are."""
    status: int = 200
    headers: Mapping[str, str] = {}
    cut: bool = False
    """Send half of the body and close the connection."""
    hang: bool = False
    """Send nothing."""


MODELS = Reply({"data": [{"id": MODEL}]})


def answer(content: Any = "An answer.", finish_reason: str = "stop", usage: Any = None, **fields: Any) -> Reply:
    """A chat completion; `fields` go into its message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **fields}}
    body = {"object": "chat.completion", "choices": [choice | {"finish_reason": finish_reason}]}
    return Reply(body | ({} if usage is None else {"usage": usage}))


class ChatServer:
    """Serves while its `with` block lasts.

    Args:
        reply: gives the reply to a request from the last message's text and the number of tries that it had before.
        models: the reply to a request for the list of models.
        port: to listen at; 0 for any that is free.
    """

    def __init__(
        self,
        reply: Callable[[str, int], Reply] = lambda text, tries: answer(),
        models: Reply = MODELS,
        port: int = 0,
    ) -> None:
        self.reply, self.models = reply, models
        self.requests: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        self.tries: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self._http = _Listener(("127.0.0.1", port), type("Handler", (_Handler,), {"chat": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Listens no more, also on connections that are open; requests that hang are let go."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def handle(self, body: dict[str, Any], authorization: str | None) -> Reply:
        text = body["messages"][-1]["content"]
        with self.lock:
            self.requests.append(body)
            self.authorizations.add(authorization)
            tries = self.tries[text]
            self.tries[text] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.reply(text, tries)
            if reply.hang:
                self.closing.wait(HANG)
            return reply
        finally:
            with self.lock:
                self.in_flight -= 1


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that come together are not refused


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the client waits for each body

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send(self.chat.models)
        else:
            self.send(Reply({}, status=200 if self.path == "/health" else 404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.path == "/v1/chat/completions"
        self.send(self.chat.handle(body, self.headers.get("Authorization")) if known else Reply({}, status=404))

    def send(self, reply: Reply) -> None:
        if reply.hang or self.chat.closing.is_set():
            self.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if reply.cut else body)
        self.close_connection = self.close_connection or reply.cut

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""
