"""The code that artifacts carry: complete, laid flat, and in need of nothing that transformers does not bring."""

import ast
import importlib
import sys

import pytest

from consistency_lens import ConsistencyLensModel, LensDecoder, LensEncoder, TunedLens, __version__
from consistency_lens.remote_code import NOTICE, auto_map, flattened, module_closure, remote_code

CLASSES = (LensDecoder, LensEncoder, ConsistencyLensModel, TunedLens)
# transformers itself, what it needs, and torch
BROUGHT = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "yaml", "tqdm", "rich"}

# what a user of transformers alone may lack, and the package itself
HIDDEN = {"consistency_lens", "accelerate", "datasets", "peft", "pyarrow", "jinja2", "bitsandbytes"}


@pytest.mark.parametrize("model_class", CLASSES)
def test_modules_import_one_another_and_what_transformers_brings(model_class):
    code = remote_code(model_class)
    for name, text in code.items():
        nodes = list(ast.walk(ast.parse(text)))
        relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
        assert {f"{node.module}.py" for node in relative} <= code.keys(), name
        assert all(node.level == 1 and "." not in node.module for node in relative), name
        # transformers looks at imports inside functions too, and asks for what they name
        absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        absolute |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert {of.split(".")[0] for of in absolute} <= BROUGHT | sys.stdlib_module_names, name
        assert text.startswith(f"{NOTICE} {__version__}, Apache-2.0;")


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_classes_are_where_the_configuration_says(model_class):
    code = remote_code(model_class)
    for place, wanted in zip(auto_map(model_class).values(), (model_class.config_class, model_class), strict=True):
        module, name = place.split(".")
        assert name == wanted.__name__
        assert any(
            isinstance(node, ast.ClassDef) and node.name == name for node in ast.parse(code[f"{module}.py"]).body
        )


@pytest.mark.parametrize("model_class", CLASSES)
def test_all_of_it_imports_where_the_package_is_not(model_class, tmp_path, monkeypatch):
    package = f"copied_{model_class.__name__}"
    (tmp_path / package).mkdir()
    for name, text in remote_code(model_class).items():
        (tmp_path / package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in HIDDEN:
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it is told that there is none
    try:
        for name in remote_code(model_class):
            importlib.import_module(f"{package}.{name.removesuffix('.py')}")
        module, name = auto_map(model_class)["AutoModel"].split(".")
        copy = getattr(sys.modules[f"{package}.{module}"], name)
        assert copy is not model_class and copy.config_class.__module__.startswith(package)
    finally:
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]


def write_package(root, **modules):
    for name, text in modules.items():
        file = root / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_nested_modules_are_laid_flat(tmp_path):
    above = "from ..below import x  # why\n\n\ndef f():\n    from .sub.deep import (\n        y,\n    )\n"
    deep = "from ...below import x\ny = x\n"
    root = write_package(tmp_path, below="x = 1\n", folder__above=above, folder__sub__deep=deep)
    closure = module_closure(root / "folder" / "above.py")
    assert [path.name for path in closure] == ["above.py", "below.py", "deep.py"]
    text = flattened(closure[0])
    assert text.splitlines()[1:] == above.replace("..below", ".below").replace(".sub.deep", ".deep").splitlines()
    copied = write_package(tmp_path / "copied", **{path.stem: flattened(path) for path in closure}) / "above.py"
    assert flattened(copied) == copied.read_text(), "a copy is passed on as it is"


def test_what_cannot_lie_flat_is_told(tmp_path):
    twice = write_package(tmp_path / "a", top="from .sub.top import x\n", sub__top="x = 1\n")
    with pytest.raises(ValueError, match="have one name"):
        module_closure(twice / "top.py")
    package = write_package(tmp_path / "b", top="from . import other\n", other="")
    with pytest.raises(ValueError, match="`from . import other`, which names no module"):
        module_closure(package / "top.py")
