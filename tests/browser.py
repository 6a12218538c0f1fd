"""A headless Chromium for tests that look at pages, if there is one on this machine."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 240_000  # milliseconds: machines that run tests may be slow, and nothing here is about speed


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's, of which each page of a test is a new context; skips the test where there is none.

    `CHROMIUM` in the environment says where it lies.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here; install one (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS), timeout=PATIENCE)
        yield browser
        browser.close()


class OpenedPage:
    """A page in a context of its own, and what went wrong in it.

    Attributes:
        page: playwright's.
        problems: console errors and warnings, exceptions, and breaches of the page's policy.
        requests: addresses that were asked for.
    """

    def __init__(self, browser: Any, place: Path | str, ready: str = "[data-part=lead]", **context: Any) -> None:
        """`ready` selects what a page has once it is there; `context` is of playwright's `new_context`."""
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}") or dialog.dismiss())
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(place.as_uri() if isinstance(place, Path) else place)
        self.page.wait_for_selector(ready, state="attached")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def close(self) -> None:
        self.context.close()
