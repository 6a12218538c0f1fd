"""Waits between tries that take no time, and are written down."""

import time
from types import SimpleNamespace

import pytest


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that `huggingface_hub` would have slept; it does not."""
    slept: list[float] = []
    clock = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")})
    clock.sleep = slept.append
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", clock)
    return slept
