"""Metrics that stand alone, as modules of the `evaluate` library; they load from the installed package, offline.

`load_metric("fve").compute(references=A, predictions=Â, mean=mu)` is `evaluate.load` of a script in this folder.
"""

from pathlib import Path
from typing import Any

from ...optional_packages import require

NAMES = ("distinct_n", "fve", "kl_recovered")


def module_path(name: str) -> str:
    """The folder of a metric's script, as `evaluate.load` wants it.

    Raises:
        ValueError: for a name that is none of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"metric module: {name!r} is not one; choose from {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)


def load_metric(name: str) -> Any:
    """An `evaluate.Metric`.

    Raises:
        ValueError: for a name that is none of `NAMES`, or if `evaluate` is not installed.
    """
    path = module_path(name)
    return require("evaluate", extra="metrics", needed_for="load_metric").load(path)
