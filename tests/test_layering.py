"""The shape of the package, read from its source: what may import what."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "consistency_lens"

# Lowest first. A module imports from its own layer or from lower ones.
LAYERS = [
    {"residual_stream", "configuration_consistency_lens", "straight_through", "losses", "schedules"}
    | {
        "optional_packages",
        "atomic_write",
        "context_length",
        "hub_connection",
        "quantised",
        "attention",
        "spans",
        "fingerprints",
        "notebook_figure",
        "offloaded",
        "token_logits",
        "summed_gradient",
        "table_product",
        "plain_arithmetic",
        "turns",
    }
    | {"version", "public_names", "remote_code", "hub_upload"},
    {"subject", "causality", "cached_passes", "context_cache", "context_attention", "text_attention", "adapters"}
    | {"rounded_weights"},
    {"artifact_subject", "lens_artifact", "lens_clone", "lens_decoder", "lens_encoder", "explanation", "steering"}
    | {"modeling_consistency_lens", "activation_to_text_pipeline", "own_subject"},
    {"data"},
    {"evaluation", "hub", "checkpoints"},
    {"training", "tuned_lens"},
    {"report"},
    {"plots"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The doors of the package: they import what they show.
ENTRIES = {"__init__", "__main__"}
NEVER_TOGETHER = {"training", "tuned_lens"}
# Published by others as params.pt; `weights_only=True` lets nothing but tensors out of it.
READS_TENSORS_OF_OTHERS = {"tuned_lens/interchange.py"}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "numpy"}

MODULES = sorted(PACKAGE.rglob("*.py"))
FLAT = [path for path in MODULES if path.parent == PACKAGE and path.stem not in ENTRIES]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    """The flat module or the folder that a file belongs to, as LAYERS names it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def nodes(tree: ast.AST, functions: bool = True) -> Iterator[ast.AST]:
    """All nodes that run, but those under `if TYPE_CHECKING`; with `functions=False`, those that run at import."""
    for node in ast.iter_child_nodes(tree):
        skipped = not functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not skipped and not is_type_checking(node):
            yield node
            yield from nodes(node, functions)


def imports(path: Path, functions: bool = True) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of each import; `from .a import b` is given as `a.b`, for b may be a module."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), functions):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield from ((node.level, prefix + alias.name) for alias in node.names)


def imported_modules(path: Path) -> set[Path]:
    """The files of the package that a file imports."""
    found = set()
    for level, name in imports(path):
        if level == 0 and name.split(".")[0] != PACKAGE.name:
            continue
        base, names = (PACKAGE, name.split(".")[1:]) if level == 0 else (path.parents[level - 1], name.split("."))
        target = base.joinpath(*names)
        for candidate in (target, target.parent):
            files = [candidate.with_suffix(".py"), candidate / "__init__.py"]
            existing = [file for file in files if file.is_file() and file != PACKAGE / "__init__.py"]
            if existing:
                found.add(existing[0])
                break
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_layer(path):
    assert part_of(path) in RANK.keys() | ENTRIES, "give it a place in LAYERS"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE or path in FLAT], ids=name_of)
def test_imports_point_down(path):
    own = part_of(path)
    parts = {part_of(target) for target in imported_modules(path)}
    assert {part for part in parts if RANK[part] > RANK[own]} == set()
    assert not (own in NEVER_TOGETHER and (NEVER_TOGETHER - {own}) & parts)


def test_no_cycles():
    waiting = {path: imported_modules(path) - {path} for path in MODULES if path.parent != PACKAGE or path in FLAT}
    # a package's own __init__ shows its modules, and they may live beside each other
    waiting = {path: targets for path, targets in waiting.items() if path.name != "__init__.py"}
    while free := [path for path, targets in waiting.items() if not targets & waiting.keys()]:
        for path in free:
            del waiting[path]
    assert [name_of(path) for path in waiting] == []


@pytest.mark.parametrize("path", FLAT, ids=name_of)
def test_flat_modules_import_their_siblings_alone(path):
    # `trust_remote_code` copies just the siblings that `from .name import ...` names
    siblings = {sibling.stem for sibling in FLAT}
    for level, name in imports(path):
        assert level <= 1, f"{name}: from .{name.split('.')[0]} import ..."
        assert level == 0 or name.split(".")[0] in siblings
        assert level == 1 or name.split(".")[0] != PACKAGE.name, f"{name}: write a relative import"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_pickled(path):
    assert {name.split(".")[0] for _, name in imports(path)}.isdisjoint({"pickle", "dill", "joblib", "cloudpickle"})
    calls = [node for node in nodes(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    if name_of(path) in READS_TENSORS_OF_OTHERS:
        calls = [call for call in calls if "weights_only=True" not in map(ast.unparse, call.keywords)]
    assert {ast.unparse(call.func) for call in calls}.isdisjoint({"torch.save", "torch.load"})
    assert not {"torch.save", "torch.load"} & {name for _, name in imports(path)}


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=name_of)
def test_the_command_line_starts_without_heavy_packages(path):
    at_import = list(imports(path, functions=False))
    assert {name.split(".")[0] for level, name in at_import if level == 0}.isdisjoint(HEAVY)
    # the package's own modules bring them in; a single level stays inside cli
    assert [name for level, name in at_import if level > 1 or name.split(".")[0] == PACKAGE.name] == []
