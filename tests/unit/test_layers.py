"""The architecture, held by a test: imports go strictly down, frameworks stay where they belong, files stay small.

Edit the tables below when the design changes; nothing else in this file should need it.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "megatron_keye"
ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    ("errors", "recipes"),
    ("config",),
    ("contract", "parallel.grid"),
    ("plan",),
    ("parallel",),
    ("data", "model", "objective"),
    ("io_server", "checkpoint"),
    ("train",),
)
"""From the bottom up. A part imports parts of lower rows and itself; parts of one row never import each other."""

MEGATRON_FILES = {
    "parallel/cpu.py",
    "parallel/groups.py",
    "model/attention.py",
    "model/decoder.py",
    "model/decoder_backend.py",
    "model/decoder_config.py",
    "model/decoder_te.py",
    "model/norm.py",
    "model/packed.py",
    "train/build.py",
    "train/checkpointing.py",
    "train/initial_weights.py",
    "train/step.py",
}
"""The only files that may import Megatron-core."""

PARTS_WITHOUT_TORCH = ("errors", "recipes", "config", "contract", "plan", "parallel.grid")
"""Pure parts: numpy at most, so that they run and are tested anywhere in milliseconds."""

FILES_WITHOUT_TORCH = ("train/cli.py", "train/commands/__init__.py", "train/commands/config.py")
"""What `keye --help` and `keye config` load."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
CODE_FOLDERS = (PACKAGE, "data_tools", "launch", "benchmarks")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` counts as a.b, since b may be a module."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def dotted(path: Path) -> str:
    """`model/decoder.py` of the package as `model.decoder`."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name: str) -> str:
    """The longest part in LAYERS that the module belongs to."""
    parts = [part for row in LAYERS for part in row if is_within(name, part)]
    assert parts, f"{name} belongs to no layer: add it to LAYERS"
    return max(parts, key=len)


def height(part: str) -> int:
    return next(level for level, row in enumerate(LAYERS) if part in row)


def own_imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, without the package's name."""
    for name in imported_modules(path):
        if is_within(name, f"{PACKAGE}.__version__"):
            continue
        if name.startswith(f"{PACKAGE}."):
            yield name.removeprefix(f"{PACKAGE}.")


PACKAGE_FILES = [path for path in python_files(PACKAGE) if dotted(path)]
relative = {path: str(path.relative_to(ROOT / PACKAGE)) for path in PACKAGE_FILES}


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative.get)
def test_imports_go_strictly_down(path):
    part = part_of(dotted(path))
    for name in own_imports(path):
        target = part_of(name)
        assert target == part or height(target) < height(part), (
            f"{relative[path]} ({part}) imports {name} ({target}), which is not below it"
        )


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative.get)
def test_megatron_and_torch_stay_where_they_belong(path):
    names = list(imported_modules(path))
    if relative[path] not in MEGATRON_FILES:
        assert not [name for name in names if is_within(name, "megatron")], f"{relative[path]} is not in MEGATRON_FILES"
    if part_of(dotted(path)) in PARTS_WITHOUT_TORCH or relative[path] in FILES_WITHOUT_TORCH:
        assert not [name for name in names if is_within(name, "torch")], f"{relative[path]} must not need torch"


@pytest.mark.parametrize("name", sorted(MEGATRON_FILES))
def test_the_list_of_megatron_files_is_not_stale(name):
    path = ROOT / PACKAGE / name
    assert path.exists(), f"{name} is gone: remove it from MEGATRON_FILES"
    assert any(is_within(module, "megatron") for module in imported_modules(path)), f"{name} imports no Megatron: remove it"


def test_the_package_imports_nothing_that_lies_beside_it():
    for path in python_files(PACKAGE):
        for name in imported_modules(path):
            assert not any(is_within(name, folder) for folder in ("data_tools", "launch", "benchmarks", "tests")), f"{path} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    modules = {dotted(path) for path in PACKAGE_FILES}
    graph = {}
    for path in PACKAGE_FILES:
        targets = {name if name in modules else name.rpartition(".")[0] for name in own_imports(path)}
        graph[dotted(path)] = targets - {dotted(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", python_files(*CODE_FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
