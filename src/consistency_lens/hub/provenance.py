"""What pins an artifact to the software that made it: versions of packages and the commit of this one."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of this package and of those named that are installed."""
    found = {"python": platform.python_version(), "consistency_lens": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this package's source; None where it was installed without one."""
    file = Path(__file__)
    try:
        # an installed package may lie within somebody else's repository, which does not have this file
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *asked: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *asked], capture_output=True, text=True, check=True
    ).stdout.strip()
