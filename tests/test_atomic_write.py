"""Files that appear whole or not at all."""

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from consistency_lens.atomic_write import atomic_file, check_writable, write_json, write_tensors, write_text

# argv: where to write. Prints the peak of the process's memory before and after, in units of what is written.
WRITE = """
import resource, sys
from pathlib import Path
import torch
from consistency_lens.atomic_write import write_tensors
tensors = {"a": torch.ones(2**25), "b": torch.zeros(2**25)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_tensors(Path(sys.argv[1]), tensors)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**18)
"""


def test_tensors_come_back_under_their_name_alone(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(True)}
    write_tensors(tmp_path / "folder" / "file.safetensors", tensors)
    assert os.listdir(tmp_path / "folder") == ["file.safetensors"]
    loaded = load_file(tmp_path / "folder" / "file.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_files_may_be_read_by_whoever_may_read_new_ones(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(1)})
        write_text(tmp_path / "text", "words")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(3)})
    (tmp_path / ".file.partial").mkdir()
    with pytest.raises(OSError):
        write_tensors(tmp_path / "file", {"a": torch.zeros(3)})
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.ones(3))


def test_tensors_are_written_without_another_copy_of_them(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 0.5


def test_what_cannot_be_written_whole_leaves_no_part_of_it(tmp_path):
    file = tmp_path / "figures.json"
    write_json(file, {"fve": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"fve": float("nan")})
    with pytest.raises(OSError, match="No space left"), atomic_file(file) as stream:
        stream.write(b"half")
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["figures.json"] and '"fve": 1' in file.read_text()


def test_tensors_that_a_full_disk_does_not_take_raise_what_the_system_says(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OSError) as raised:
            write_tensors(tmp_path / "file", {"a": torch.ones(20_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG and raised.value.strerror == "File too large"
    assert os.listdir(tmp_path) == []


def test_a_folder_that_nothing_can_be_written_to_is_named(tmp_path):
    check_writable(tmp_path / "new", "output_dir")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir: cannot write to .*file.*; pass another"):
        check_writable(tmp_path / "file", "output_dir")
