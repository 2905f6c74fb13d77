"""The architecture: modules belong to stages, later stages import earlier ones, and no imports are circular."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

from lemoe.routing.registry import ROUTERS
from lemoe.settings import preset_names
from lemoe.training.methods import METHODS

# Each stage may import itself and those before it.
STAGES = (
    "errors",
    "data",
    "settings",
    "base",
    "routing",
    "adaptor",
    "inference",
    "planning",
    "training",
    "evaluation",
    "report",
    "runs",
    "exporting",
    "serving",
)
MODULES = sorted((REPOSITORY / "lemoe").rglob("*.py"))
ENTRIES = ("lemoe", "lemoe.__main__")  # the public names, which come from everywhere, and `python -m lemoe`


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_stage(module: str) -> str | None:
    """The stage of a module of lemoe; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def find_imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of lemoe that are imported anywhere in a module, for types alone or inside a function too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


ALL_MODULES = {module_name(path) for path in MODULES}
IMPORTS = {
    module_name(path): set(find_imports(ast.parse(path.read_text("utf-8")), ALL_MODULES))
    for path in MODULES
    if module_name(path) not in ENTRIES
}


def test_every_module_belongs_to_a_stage() -> None:
    assert {find_stage(module) for module in IMPORTS} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_itself_and_earlier_ones(stage: str) -> None:
    allowed = {None, *STAGES[: STAGES.index(stage) + 1]}
    upward = [
        f"{module} imports {imported}"
        for module, targets in IMPORTS.items()
        if find_stage(module) == stage
        for imported in sorted(targets)
        if find_stage(imported) not in allowed
    ]
    assert not upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    loading = {
        module_name(path): set(find_imports(_loading_statements(ast.parse(path.read_text("utf-8"))), ALL_MODULES))
        for path in MODULES
        if module_name(path) not in ENTRIES
    }
    order = TopologicalSorter({module: targets - {module, "lemoe"} for module, targets in loading.items()})
    assert set(order.static_order()) >= set(loading)  # raises CycleError


def _loading_statements(tree: ast.Module) -> ast.Module:
    """What runs when a module is loaded: its statements outside of functions and of `if TYPE_CHECKING`."""
    outer = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module([node for node in outer if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])


def test_the_library_neither_prints_nor_knows_the_command_line() -> None:
    foreign = {"click", "rich", "lemoe_cli"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert foreign.isdisjoint(name.partition(".")[0] for name in names), path


def test_a_dependency_on_a_later_stage_would_be_noticed() -> None:
    tree = ast.parse("def late():\n    from lemoe.runs.edit import edit\n")
    assert list(find_imports(tree, ALL_MODULES)) == ["lemoe.runs.edit"]


def test_a_method_is_registered_in_one_place() -> None:
    assert set(METHODS) == set(preset_names()) == {name for name, method in METHODS.items() if method.name == name}
    assert {method.router for method in METHODS.values() if method.router} == set(ROUTERS.values())
    assert all(method.router for method in METHODS.values() if not method.baseline)
