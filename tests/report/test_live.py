"""The page with a server behind it: what it answers, what it refuses and how, and many clients at once."""

import asyncio
import html
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import OpenedPage, chromium
from starlette.testclient import TestClient
from tiny_lenses import disturb, tiny_lens

from consistency_lens.report.explorer import read_texts
from consistency_lens.report.live import LARGEST_BODY, Busy, ReadingQueue, make_app
from consistency_lens.report.serve_arguments import ServeArguments

TEXT = "w9 w10 w11 w12"
MAX_TOKENS = 8
# what is wrong with a request -> its body, and the status and words of the answer
REFUSED = {
    "empty": (b"", 400, "no JSON in UTF-8"),
    "binary": (b"\xff\xfe\x00binary\x00", 400, "no JSON in UTF-8"),
    "deep": (b"[" * 60_000, 400, "no JSON in UTF-8"),
    "list": (b'["w9"]', 422, "has no text"),
    "number": (b'{"text": 7}', 422, "has no text"),
    "surrogate": (b'{"text": "\\ud800"}', 422, "lone surrogate"),
    "no text": (b'{"text": ""}', 422, "empty text"),
    "spaces": (b'{"text": "   "}', 422, "empty text"),
    "long": (b'{"text": "' + b"w9 " * (MAX_TOKENS + 1) + b'"}', 422, "10 tokens, 8 are read"),
    "huge": (b'{"text": "' + b"w" * LARGEST_BODY + b'"}', 413, "65,536 bytes"),
}


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


@pytest.fixture(scope="module")
def client(lens):
    with TestClient(make_app(lens, "user/lens", max_tokens=MAX_TOKENS), base_url="http://127.0.0.1") as client:
        yield client


def test_a_text_is_read_as_the_lens_reads_it(client, lens):
    answer = client.post("/api/explain", json={"text": TEXT})
    expected = read_texts(
        lens, [(TEXT, [1, 9, 10, 11, 12])], source="Your text", max_tokens=8, lens_hash=None, ablation=True
    )
    assert answer.status_code == 200 and answer.json() == expected
    assert answer.json()["texts"][0]["positions"] == [1, 2, 3, 4]


def test_the_page_may_ask_its_own_server_and_nobody_else(client):
    policy = html.unescape(re.search('Content-Security-Policy" content="([^"]+)"', client.get("/").text)[1])
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy


@pytest.mark.parametrize(("body", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_a_line(client, body, status, words):
    answer = client.post("/api/explain", content=body)
    assert answer.status_code == status
    assert words in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_a_page_of_another_name_is_turned_away(client):
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_other_addresses_are_not_there(client):
    assert client.get("/docs").status_code == 404 and client.get("/../etc/passwd").status_code == 404


def test_many_clients_get_their_answer_or_are_told_to_come_back(lens):
    app = make_app(lens, "user/lens", queue=4)
    with TestClient(app, base_url="http://127.0.0.1") as client, ThreadPoolExecutor(50) as threads:
        ask = lambda _: client.post("/api/explain", json={"text": TEXT})  # noqa: E731
        answers = list(threads.map(ask, range(100)))
    codes = {answer.status_code for answer in answers}
    assert 200 in codes and codes <= {200, 429}
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 429)


def test_the_queue_is_as_long_as_it_may_be_and_empties():
    going = threading.Event()

    async def work():
        queue = ReadingQueue(lambda text: going.wait(10) and text, length=2)
        asked = [asyncio.create_task(queue(text, 10)) for text in ("a", "b")]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await queue("c", 10)
        going.set()
        assert await asyncio.gather(*asked) == ["a", "b"]
        while queue.taken:
            await asyncio.sleep(0)
        assert await queue("d", 10) == "d"

    asyncio.run(work())


def test_a_text_that_takes_too_long_is_given_up_and_one_that_waits_is_not_read():
    going, read = threading.Event(), []

    async def work():
        queue = ReadingQueue(lambda text: read.append(text) or going.wait(10), length=2)
        asked = [asyncio.create_task(queue(text, 0.01)) for text in ("a", "b")]
        for task in asked:
            with pytest.raises(TimeoutError):
                await task
        assert queue.taken == 1  # the one in the thread
        going.set()
        while queue.taken:
            await asyncio.sleep(0)

    asyncio.run(work())
    assert read == ["a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be above 0"),
        ({"port": 0}, "port must lie in"),
        ({"lens": ""}, "lens: got"),
    ],
    ids=["max_tokens", "port", "lens"],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        ServeArguments(**{"lens": "lens"} | changes)


@pytest.fixture(scope="module")
def address(lens):
    """A real server on a free port."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(make_app(lens, "user/lens"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.mark.browser
def test_a_text_is_typed_and_explained_in_a_browser(address, lens):
    with chromium() as browser:
        opened = OpenedPage(browser, address)
        opened.page.fill("#text", TEXT)
        opened.page.press("#text", "Enter")
        opened.page.wait_for_selector(".token")
        assert opened.page.locator(".token").all_inner_texts()[0].strip() == "w9"
        assert "read 4 tokens" in opened.page.inner_text(".ask")
        opened.page.fill("#text", "<script>alert(1)</script>")
        opened.page.press("#text", "Enter")
        opened.page.wait_for_selector(".ask [role=status]:has-text('read 1 tokens')")
        assert opened.page.locator(".token").count() == 1
        assert opened.problems == [] and {url.split("/")[2] for url in opened.requests} == {address.split("/")[2]}
        opened.close()
