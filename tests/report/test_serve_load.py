"""`consistency-lens serve` as a process of its own, under fifty clients at once: its answers, and its memory."""

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter

import httpx2
import psutil
import pytest
from test_live import MAX_TOKENS, REFUSED, TEXT
from tiny_lenses import disturb, tiny_lens, tiny_tokenizer
from tiny_models import tiny_model

CLIENTS, WARM_UP, SECONDS, QUEUE = 50, 5, 30, 8
MEBIBYTE = 2**20
READ = {
    "plain": TEXT,
    "markup": "</script><script>alert(1)</script> <img src=x onerror=alert(2)>",
    "controls": "\x00 \x1b[31m \u202e w9",
    "right to left": "שלום w9",
    "long word": "y" * 60_000,
}
# name -> body, status
REQUESTS = {name: (body, status) for name, (body, status, _) in REFUSED.items()}
REQUESTS |= {name: (json.dumps({"text": text}).encode(), 200) for name, text in READ.items()}


@pytest.fixture
def served(tmp_path):
    """The process and its address, once it answers."""
    lens, subject = tmp_path / "lens", tmp_path / "subject"
    tiny_model("llama").save_pretrained(subject)
    tiny_tokenizer().save_pretrained(subject)
    disturb(tiny_lens()).save_pretrained(lens)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "consistency_lens", "serve", str(lens), "--model", str(subject), "--device", "cpu",
        "--port", str(port), "--max_tokens", str(MAX_TOKENS), "--queue", str(QUEUE),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(address):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        yield process, address, tmp_path / "said"
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        return httpx2.get(address, timeout=60).status_code == 200
    except httpx2.TransportError:
        return False


class Load:
    """Clients that ask one request after the other for some seconds, and the server's memory meanwhile.

    Attributes:
        statuses: how often each came.
        wrong: answers that were not to be expected.
        memory: bytes of the server's process, twice a second.
    """

    def __init__(self, process: psutil.Process, address: str) -> None:
        self.process, self.address = process, address
        self.statuses: Counter[int] = Counter()
        self.wrong: list[tuple[str, int, str]] = []
        self.memory: list[int] = []

    async def run(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        async with httpx2.AsyncClient(base_url=self.address, timeout=60) as http:
            await asyncio.gather(self.watch(), *(self.ask(http, number) for number in range(CLIENTS)))

    async def watch(self) -> None:
        while time.monotonic() < self.end:
            self.memory.append(self.process.memory_info().rss)
            await asyncio.sleep(0.5)

    async def ask(self, http: httpx2.AsyncClient, number: int) -> None:
        draws = random.Random(number)
        while time.monotonic() < self.end:
            name = draws.choice(list(REQUESTS))
            body, expected = REQUESTS[name]
            answer = await http.post("/api/explain", content=body)
            self.statuses[answer.status_code] += 1
            is_busy = answer.status_code == 429 and "Retry-After" in answer.headers
            if answer.status_code != expected and not is_busy:
                self.wrong.append((name, answer.status_code, answer.text[:200]))


@pytest.mark.slow
def test_fifty_clients_are_answered_or_told_to_come_back_and_the_memory_stays(served):
    process, address, said = served
    load = Load(psutil.Process(process.pid), address)
    asyncio.run(load.run(WARM_UP))
    load.memory.clear()
    asyncio.run(load.run(SECONDS))
    assert load.wrong == []
    assert load.statuses.keys() == {200, 400, 413, 422, 429}
    third = len(load.memory) // 3
    early, late = statistics.median(load.memory[:third]), statistics.median(load.memory[-third:])
    print(f"{dict(load.statuses)}, {early / MEBIBYTE:.1f} MiB early, {late / MEBIBYTE:.1f} MiB late")
    assert late - early < 4 * MEBIBYTE
    assert httpx2.post(f"{address}/api/explain", json={"text": TEXT}, timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert "Traceback" not in said.read_text()
