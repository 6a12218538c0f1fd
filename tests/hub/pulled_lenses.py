"""Lenses released on a Hub on loopback, changes of what it holds, and what a pull has left."""

import copy
import json

import pytest
from hub_repositories import Blob
from hub_server import HubServer
from published_small_lenses import change, write_lens

from consistency_lens.hub.lens_pull import pull_lenses
from consistency_lens.hub.lens_push import push_lenses

LONE, REPO, TAG, NEXT = "user/lens", "user/lenses", "v2026.01.31", "v2026.02.01"

# a base that nobody asks for, as none is on the Hub
BASE = {"base": "somewhere", "revision": None}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What the Hub holds after the releases."""
    return {}


@pytest.fixture
def released(hub, kept, tmp_path_factory) -> HubServer:
    """A lone lens, and a collection of two after two releases."""
    if not kept:
        root = tmp_path_factory.mktemp("lenses")
        push_lenses(write_lens(root / "alone", **BASE), LONE, tag=TAG)
        write_lens(root / "all" / "one", **BASE)
        write_lens(root / "all" / "two", "decoder", **BASE)
        push_lenses(root / "all", REPO, tag=TAG)
        change(root / "all" / "one", "metrics.json", fve=0.9)
        push_lenses(root / "all" / "one", REPO, tag=NEXT)
        kept.update(repos=copy.deepcopy(hub.repos), large=dict(hub.large))
    hub.repos, hub.large = copy.deepcopy(kept["repos"]), dict(kept["large"])
    hub.requests.clear()
    return hub


def pull(path, repo=REPO, **arguments):
    return pull_lenses(repo, path, progress=False, **arguments)


def put(hub, name, content, repo=REPO):
    """Makes a commit that changes one file."""
    head = hub.model(repo).head.files
    blob = Blob(content, name.endswith((".safetensors", ".bin")))
    return hub.model(repo).commit("main", f"change {name}", {**head, name: blob})


def reindex(hub, repo=LONE, **keys):
    """Makes a commit whose index has other keys for its first lens."""
    content = json.loads(hub.model(repo).head.files["INDEX.json"].content)
    next(iter(content["lenses"].values())).update(keys)
    put(hub, "INDEX.json", json.dumps(content).encode(), repo)


def names(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def left(tmp_path):
    return [file for file in tmp_path.iterdir() if file.name not in ("hub_cache", "datasets_cache")]
