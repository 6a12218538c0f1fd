"""The code that an artifact carries, so that it loads with `trust_remote_code=True` where this package is missing.

`transformers` fetches the module that `auto_map` in `config.json` names and, over and over, the modules beside it that
`from .name import ...` names; it knows no folders. So the modules that a model needs are laid side by side, with each
relative import made one of a sibling. Nothing else in them changes.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from .version import __version__

NOTICE = "# From consistency-lens"
HEADER = f"{NOTICE} {__version__}, Apache-2.0; written beside the model for trust_remote_code. Change it there."


def remote_code(model_class: type) -> dict[str, str]:
    """File name -> text of each module that a model needs, the same ones for the same package.

    Raises:
        ValueError: if two modules have one name, or one imports a package and not its modules.
    """
    return {path.name: flattened(path) for path in module_closure(_source(model_class))}


def auto_map(model_class: Any) -> dict[str, str]:
    """What `config.json` says of that code: the classes that `AutoConfig` and `AutoModel` find in it."""
    classes = {"AutoConfig": model_class.config_class, "AutoModel": model_class}
    return {auto: f"{_source(of).stem}.{of.__name__}" for auto, of in classes.items()}


def module_closure(path: Path) -> list[Path]:
    """The modules that one needs, itself included, sorted by name; imports inside functions count.

    Raises:
        ValueError: see `remote_code`.
    """
    found: dict[str, Path] = {}
    waiting = [path.resolve()]
    while waiting:
        path = waiting.pop()
        if found.setdefault(path.name, path) != path:
            raise ValueError(f"remote code: {path} and {found[path.name]} have one name; rename one of them")
        imported = [imported_file(path, node) for node in relative_imports(path)]
        waiting += [file for file in imported if file not in found.values()]
    return [found[name] for name in sorted(found)]


@cache
def relative_imports(path: Path) -> list[ast.ImportFrom]:
    """The relative imports of a module, wherever they stand in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]


def imported_file(path: Path, node: ast.ImportFrom) -> Path:
    """The module that a relative import names.

    Raises:
        ValueError: if it names a package.
    """
    file = path.parents[node.level - 1].joinpath(*(node.module or "__init__").split(".")).with_suffix(".py")
    if node.module is None or not file.is_file():
        raise ValueError(
            f"remote code: {path} has `{ast.unparse(node)}`, which names no module that could lie beside it; import "
            "from the module itself"
        )
    return file


def flattened(path: Path) -> str:
    """A module's source under its notice, with relative imports of siblings alone."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for node in relative_imports(path):
        name = str(node.module).rpartition(".")[2]
        before, line = lines[node.lineno - 1][: node.col_offset], lines[node.lineno - 1][node.col_offset :]
        lines[node.lineno - 1] = before + re.sub(r"^from\s+\.[.\w]*", f"from .{name}", line)
    if not lines or not lines[0].startswith(NOTICE):  # a model that came with its code passes it on as it is
        lines.insert(0, f"{HEADER}\n")
    return "".join(lines)


def _source(of: type) -> Path:
    return Path(str(sys.modules[of.__module__].__file__))
