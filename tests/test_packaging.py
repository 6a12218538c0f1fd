"""setup.cfg: what the package imports is what it asks for."""

import ast
import configparser
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "consistency_lens"
# a package that another is made of, and always brings
BROUGHT_BY = {"starlette": "fastapi"}
# what is itself imported only where its extra is there
OF_EXTRAS = ("notebook_figure.py", "evaluation/modules/*/*.py")


def imports(file, anywhere=True):
    """The packages that a module imports; those of its functions and of type checks only with `anywhere`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"consistency_lens"}


KNOWN = packages_distributions()


def distributions_of(name):
    """What may be asked for to have a package, as on the index."""
    return {canonicalize_name(owner) for owner in [*KNOWN.get(name, [name]), BROUGHT_BY.get(name, name)]}


def asked_for(section, *options):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for option in options or setup[section] for line in setup[section][option].split("\n") if line]
    return {canonicalize_name(Requirement(line).name) for line in lines}


ALWAYS = asked_for("options", "install_requires")
WITH_EXTRAS = ALWAYS | asked_for("options.extras_require")


@pytest.mark.parametrize("anywhere", [True, False])
def test_every_package_that_is_imported_is_asked_for(anywhere):
    optional = {path for pattern in OF_EXTRAS for path in SOURCE.glob(pattern)}
    files = set(SOURCE.rglob("*.py")) - (set() if anywhere else optional)
    used = set().union(*(imports(file, anywhere) for file in files))
    there = WITH_EXTRAS if anywhere else ALWAYS
    assert {name for name in used if not distributions_of(name) & there} == set()
