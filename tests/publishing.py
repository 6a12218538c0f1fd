"""Lenses to publish on a Hub on loopback, and what lies there then."""

import json
import shutil

import pytest
from published_lenses import add_subject, fit_lens, save_subject

from consistency_lens.tuned_lens.publish import publish_tuned_lens

REPO, TAG, NEXT = "user/tuned-lenses", "v2026.01.31", "v2026.02.01"
FILES = {"README.md", "NOTICE", "config.json", "metrics.json", "model.safetensors", "provenance.json"}
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A lens of a model in a folder."""
    return fit_lens(tmp_path_factory.mktemp("local"))


@pytest.fixture
def lens(local, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(local.path, tmp_path / "lens")


@pytest.fixture
def on_hub(hub, tmp_path):
    """A lens of a model on the Hub."""
    commit = add_subject(hub, "org/tiny", save_subject(tmp_path / "there"))
    return fit_lens(tmp_path / "of_hub", "org/tiny", commit)


def change(lens, **keys):
    file = lens / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def publish(path, tag=TAG, **arguments):
    return publish_tuned_lens(path, REPO, tag=tag, **arguments)


def files_of(hub):
    return {name: blob.content for name, blob in hub.dataset(REPO).head.files.items()}


def below(files, folder):
    return {name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")}
