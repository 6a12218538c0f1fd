"""Packages that only some features need: one place that says which extra to install."""

import importlib
from types import ModuleType


def require(package: str, extra: str, needed_for: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        ValueError: if it is not installed, naming the extra that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{needed_for} needs the package {package!r}, which is not installed; "
            f'run: pip install "consistency-lens[{extra}]"'
        ) from error
