import platform
import shutil
import subprocess

import pytest
import torch

from consistency_lens import __version__
from consistency_lens.hub import provenance
from consistency_lens.hub.provenance import git_commit, package_versions


def test_versions_are_those_of_what_is_installed():
    versions = package_versions(["torch", "no-such-package"])
    assert versions == {
        "python": platform.python_version(),
        "consistency_lens": __version__,
        "torch": torch.__version__,
    }


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_repository_that_is_not_ours_is_not_taken(tmp_path, monkeypatch):
    file = tmp_path / "provenance.py"
    file.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert git_commit() is None

    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert git_commit() is None
    git("add", "provenance.py")
    assert len(git_commit()) == 40
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
