"""The Dockerfile, read: there is no Docker where tests run. What it copies is there, enough, and installs."""

import configparser
import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def instructions():
    """(name, rest) of each instruction, without comments, continued lines joined."""
    lines = [
        line for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines() if not line.strip().startswith("#")
    ]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def values(name):
    return [rest for found, rest in instructions() if found == name]


def sources():
    return [ROOT / part for rest in values("COPY") for part in shlex.split(rest)[:-1]]


def is_ignored(path):
    """Whether .dockerignore keeps a path from the build: the last line that matches it or a folder above decides."""
    relative, ignored = path.relative_to(ROOT), False
    places = [relative, *relative.parents[:-1]]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(place.name, pattern[3:]) for place in places)
        else:
            matches = any(fnmatch.fnmatch(str(place), pattern) and "/" not in str(place) for place in places)
        ignored = not line.startswith("!") if matches else ignored
    return ignored


def test_what_is_copied_is_there_and_reaches_the_build():
    assert sources() and all(source.exists() for source in sources())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    copied = [ROOT / file for file in tracked if any((ROOT / file).is_relative_to(source) for source in sources())]
    assert [path for path in copied or sources() if is_ignored(path)] == []


@pytest.mark.parametrize(
    "name", ["outputs/tiny_stories/model.safetensors", ".git/config", ".venv/bin/python", "tests/a.py"]
)
def test_nothing_else_does(name):
    assert is_ignored(ROOT / name)
    assert is_ignored(ROOT / "src" / "consistency_lens" / "__pycache__" / "a.pyc")


def test_its_extras_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = next(rest for rest in values("ARG") if rest.startswith("EXTRAS=")).removeprefix("EXTRAS=").split(",")
    assert set(extras) <= set(setup["options.extras_require"])
    assert not {"test", "lint", "flash"} & set(extras)


def test_it_allocates_memory_as_the_makefile_does():
    wanted = re.findall(r"^export (MALLOC_\w+) = (\d+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    environment = " ".join(values("ENV"))
    assert len(wanted) == 2 and all(f"{name}={value}" in environment for name, value in wanted)


def test_it_does_not_run_as_root_and_starts_from_a_release_that_is_named():
    assert values("USER")[-1] not in ("root", "0")
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", values("ARG")[0])


@pytest.mark.slow
def test_what_is_copied_makes_a_package_with_all_its_files(tmp_path):
    for source in sources():
        target = tmp_path / "build" / source.name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "build")], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        script = wheel.read("consistency_lens/cli/train.sbatch")
    package = ROOT / "src" / "consistency_lens"
    assert script == (package / "cli" / "train.sbatch").read_bytes()
    modules = {
        str(path.relative_to(package.parent)) for path in package.rglob("*.py") if "__pycache__" not in path.parts
    }
    assert modules <= names
