"""What all tests share: no network, and the pretrained model that some tests read."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
from hub_server import HubServer
from huggingface_hub import HfFileSystem, close_session, constants, hf_api

DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES260K, STORIES = DATA / "stories260K", DATA / "stories.txt"


@pytest.fixture(autouse=True, scope="session")
def no_power_failure() -> Iterator[None]:
    """Syncing to the disk takes most of the time of many runs; what it saves them from happens in no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """Keeps what is imported out of garbage collection: every training collects, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The folder of a small pretrained story model, made by others; it is not part of the repository."""
    if not STORIES260K.is_dir():
        pytest.skip("no pretrained model at ../shared/data/stories260K")
    return STORIES260K


@pytest.fixture(scope="session")
def stories() -> Path:
    """A text of children's stories; it is not part of the repository."""
    if not STORIES.is_file():
        pytest.skip("no stories at ../shared/data/stories.txt")
    return STORIES


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A Hub on loopback that `huggingface_hub` and `datasets` take for the real one, signed in to, with empty caches.

    Both libraries read their settings when they are imported, so they are set in their modules.
    """
    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_OFFLINE": False,
            "HF_DATASETS_CACHE": tmp_path / "datasets_cache",
            "HF_UPDATE_DOWNLOAD_COUNTS": False,
        }.items():
            monkeypatch.setattr(datasets.config, name, value)
        # clients that are made once: what `huggingface_hub.list_repo_tree` and the like are methods of, and another
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()
        close_session()  # another server may get this one's port
