"""Whatever goes wrong on the way: no damaged lens under its name, and no release that is shown before it is whole."""

import copy
import json
import random

import pytest
from hub_faults import Fault
from hub_server import TOKEN
from published_small_lenses import change, write_lens
from waits import waits

from consistency_lens.data.activation_cache import file_hash
from consistency_lens.data.cache_check import VerificationError
from consistency_lens.hub.lens_collection import list_lenses
from consistency_lens.hub.lens_pull import pull_lenses
from consistency_lens.hub.lens_push import push_lenses
from consistency_lens.hub_connection import HubError

__all__ = ["waits"]

REPO, TAG, NEXT = "user/lenses", "v2026.01.31", "v2026.02.01"
# of requests, and of seconds that may be slept: six tries of a request, each after at most 8 seconds
MOST_REQUESTS, LONGEST_SLEEP = 120, 8 * 6
# Once, a few times, or for as long as somebody tries.
TIMES = (1, 3, 99)


@pytest.fixture
def quick(hub, waits, monkeypatch):
    """The Hub, with waits that take no time, and chunks that a small file has several of."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64)
    hub.slowness = 0.2
    return hub


@pytest.fixture
def patience(monkeypatch):
    """Sets the seconds after which a request is given up."""

    def set_to(seconds):
        monkeypatch.setattr("consistency_lens.hub_connection.PATIENCE", seconds)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", seconds)

    return set_to


@pytest.fixture
def lens(tmp_path):
    return write_lens(tmp_path / "small", base="somewhere", revision=None)


def calm(hub, patience, kept=None):
    """Ends all faults; with `kept`, the Hub is as it was."""
    patience(60.0)
    hub.planned.clear()
    hub.settle()
    hub.happened.clear()
    hub.requests.clear()
    if kept is not None:
        hub.repos, hub.large = copy.deepcopy(kept[0]), dict(kept[1])


def plan(hub, patience, draw, num_requests):
    """One of the faults, at one of the requests that a call makes when all goes well."""
    fault = draw.choice(list(Fault))
    times = draw.choice(TIMES)
    if fault is Fault.SLOW:
        times = 1
        patience(0.1)
    hub.plan(fault, first=draw.randrange(num_requests), times=times)
    return f"{fault.name} {next(iter(hub.planned))}"


def attempt(call, what, hub, slept):
    """The error of a call, if it has one: of a line, without a token, after not too many tries."""
    slept.clear()
    try:
        call()
    except (HubError, VerificationError, ValueError) as error:
        message = str(error)
        assert "\n" not in message and TOKEN not in message, what
        assert any(hint in message for hint in ("again", "pass another", "pull again", "check the name")), message
        failed = error
    else:
        failed = None
    assert len(hub.requests) <= MOST_REQUESTS and max(slept, default=0) <= LONGEST_SLEEP, what
    return failed


def check_release(hub, what):
    """What is listed has its tag, and under it all files as the index has them; returns the entry of the lens."""
    found = list_lenses(REPO)
    (entry,) = found.entries.values()
    assert entry.release in found.tags, what
    commit = hub.model(REPO).at(entry.release)
    for name, record in entry.paths.items():
        assert commit.files[name].sha256 == record.sha256, (what, name)
    return entry


def push_under_faults(hub, lens, waits, patience, count):
    push_lenses(lens, REPO, tag=TAG)
    kept = copy.deepcopy(hub.repos), dict(hub.large)
    change(lens, "metrics.json", fve=0.9)
    for _ in range(2):  # what the first asks for once in a process is not counted
        calm(hub, patience, kept)
        push_lenses(lens, REPO, tag=NEXT)
    num_requests, draw, came, failures = len(hub.requests), random.Random(316), 0, 0
    for _ in range(count):
        calm(hub, patience, kept)
        what = plan(hub, patience, draw, num_requests)
        failed = attempt(lambda: push_lenses(lens, REPO, tag=NEXT), what, hub, waits)
        came, failures = came + bool(hub.happened), failures + (failed is not None)
        calm(hub, patience)
        entry = check_release(hub, what)
        assert (entry.release, entry.metrics["fve"]) in ((TAG, 0.5), (NEXT, 0.9)), what
        if failed is None:
            assert entry.release == NEXT, what
        elif entry.release == TAG:
            try:
                push_lenses(lens, REPO, tag=NEXT)
            except ValueError as error:  # what was given up as too slow may have been done after that
                assert "SLOW" in what and f"has {NEXT} already" in str(error), what
            assert check_release(hub, what).release == NEXT, what
    assert came == count and 0 < failures < count


def pull_under_faults(hub, lens, waits, patience, tmp_path, count):
    push_lenses(lens, REPO, tag=TAG)
    calm(hub, patience)
    pull_lenses(REPO, tmp_path / "first", progress=False)
    num_requests, draw, came, failures = len(hub.requests), random.Random(316), 0, 0
    for case in range(count):
        calm(hub, patience)
        what = plan(hub, patience, draw, num_requests)
        path = tmp_path / f"pulled_{case}"
        failed = attempt(lambda path=path: pull_lenses(REPO, path, progress=False), what, hub, waits)
        came, failures = came + bool(hub.happened), failures + (failed is not None)
        calm(hub, patience)
        assert path.exists() is (failed is None), what
        pull_lenses(REPO, path, progress=False)
        index = json.loads((path / "INDEX.json").read_text())
        (entry,) = index["lenses"].values()
        assert {file.name for file in path.iterdir()} == entry["files"].keys() | {"INDEX.json"}, what
        for name, record in entry["files"].items():
            assert file_hash(path / name) == record["sha256"], (what, name)
    assert came == count and 0 < failures < count


def test_pushes(quick, lens, waits, patience):
    push_under_faults(quick, lens, waits, patience, 24)


def test_pulls(quick, lens, waits, patience, tmp_path):
    pull_under_faults(quick, lens, waits, patience, tmp_path, 36)


@pytest.mark.slow
def test_many_pushes(quick, lens, waits, patience):
    push_under_faults(quick, lens, waits, patience, 100)


@pytest.mark.slow
def test_many_pulls(quick, lens, waits, patience, tmp_path):
    pull_under_faults(quick, lens, waits, patience, tmp_path, 100)
