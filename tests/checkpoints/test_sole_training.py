"""The folder of a run: whose it is, and what in it would be lost."""

import errno
import json

import pytest

from consistency_lens.checkpoints.run_folder import check_folder, sole_training

LENS = "consistency_lens"


def test_a_training_has_its_folder_to_itself_till_its_end(tmp_path):
    folder = tmp_path / "new" / "run"
    with (
        sole_training(folder),
        pytest.raises(ValueError, match="another training is at work in .*run'; wait for it, stop it"),
        sole_training(folder),
    ):
        raise AssertionError("two at once")
    assert list(tmp_path.iterdir()) == []  # what was made for nothing is gone
    with sole_training(folder):
        (folder / "config.json").touch()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="output_dir: cannot write to .*file.*; pass another folder"):
            sole_training(folder).__enter__()


def test_a_file_system_without_locks_is_told_and_trained_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", no_locks)
    with sole_training(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    assert "its file system has no locks" in caplog.text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "llama"}'}, "holds a model of type 'llama', which the training would write"),
        ({"config.json": "{"}, "holds a model of type 'unknown'"),
        ({"README.md": "My project"}, "holds a README of something else"),
    ],
)
def test_what_the_end_of_a_training_would_write_over_is_kept(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"output_dir: .* {message}"):
        check_folder(tmp_path, LENS)


def test_a_training_may_follow_another_of_its_kind(tmp_path):
    check_folder(tmp_path / "nowhere", LENS)
    (tmp_path / "checkpoint-2").mkdir()
    check_folder(tmp_path, LENS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": LENS}))
    (tmp_path / "README.md").write_text("Its card")
    check_folder(tmp_path, LENS)
