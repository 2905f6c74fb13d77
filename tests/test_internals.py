"""The page on internals says what is true: its paths, names and constants are the code's, and its examples run."""

import ast
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

import lemoe
from lemoe.base.tokens import Passage
from lemoe.evaluation.scoring import Answer, EncodedProbe, MeasuredProbe
from lemoe.routing.router import Explanation
from lemoe.training.methods import Method

PAGE = (REPOSITORY / "docs" / "internals.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"\b(?:lemoe|lemoe_cli|tests|docs)/[\w/]*(?:\.\w+)*", PAGE)))
REFERENCES = sorted(set(re.findall(r"(\blemoe\w*/[\w/]+\.py)::([\w.]+)", PAGE)))
ROW = re.compile(r"^\| `(_?[A-Z][A-Z0-9_]*)` \| `(lemoe/[\w/]+\.py)` \| `([^`]+)` \|", re.MULTILINE)
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
}

Number = int | float | tuple[int | float, ...]


def number_of(node: ast.expr, known: dict[str, Number]) -> Number:
    """The number, or tuple of numbers, that an expression of literals and `known` constants makes.

    Raises:
        ValueError: if it makes something else.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number_of(node.operand, known)  # type: ignore[operator]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        made: Number = OPERATIONS[type(node.op)](number_of(node.left, known), number_of(node.right, known))
        return made
    if isinstance(node, ast.Tuple) and node.elts:
        return tuple(number_of(element, known) for element in node.elts)  # type: ignore[misc]
    raise ValueError("no number")


def assignments(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement of a module assigns to, each with its expression."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
        yield node.target.id, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from (
                    (ast.unparse(name), value) for name, value in zip(target.elts, node.value.elts, strict=True)
                )


def constants(path: Path) -> dict[str, Number]:
    """The numbers that a module names in capitals."""
    found: dict[str, Number] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name, value in assignments(node):
            if name.isupper():
                try:
                    found[name] = number_of(value, found)
                except ValueError:
                    continue
    return found


CODE = {
    (name, path.relative_to(REPOSITORY).as_posix()): value
    for path in sorted((REPOSITORY / "lemoe").rglob("*.py"))
    for name, value in constants(path).items()
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_on_the_page_exists(path: str) -> None:
    assert (REPOSITORY / path).exists()


@pytest.mark.parametrize(("path", "name"), REFERENCES)
def test_every_name_on_the_page_stands_in_its_file(path: str, name: str) -> None:
    inside: Any = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        members = {node.name: node for node in inside.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        members |= {assigned: node for node in inside.body for assigned, _ in assignments(node)}
        assert part in members
        inside = members[part]


def test_the_table_holds_every_constant_of_the_code_with_its_value() -> None:
    table = {(name, path): number_of(ast.parse(value, mode="eval").body, {}) for name, path, value in ROW.findall(PAGE)}
    assert len(table) == len(ROW.findall(PAGE))
    assert table == CODE


def test_every_section_that_the_page_links_to_is_there() -> None:
    for target, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", PAGE):
        page = REPOSITORY / "docs" / target if target else REPOSITORY / "docs" / "internals.md"
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]


def example(name: str) -> str:
    """The block of Python behind a mark."""
    found = re.search(rf"<!-- tested: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def run_example(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example as the module that it would be."""
    made = ModuleType(module)
    monkeypatch.setitem(sys.modules, module, made)
    exec(compile(example(name), "docs/internals.md", "exec", dont_inherit=True), made.__dict__)
    return made


def test_the_example_of_a_method_teaches_and_leaves_the_base_as_it_was(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_example("method", "lemoe.training.norms", monkeypatch)
    settings = lemoe.resolve_settings("ft", None, {"layer": 1, "steps": 20, "learning_rate": 0.05})
    losses: list[float] = []
    change = Method("norms", "norms", baseline=True).train_round(
        base, facts[:2], settings, None, lambda step: losses.append(step.loss)
    )
    assert losses[-1] < losses[0]
    ids = base.tokenizer(facts[0].prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        before = base.model(ids).logits
        with change.applied(base):
            assert not torch.equal(base.model(ids).logits, before)
        assert torch.equal(base.model(ids).logits, before)


@pytest.fixture
def measured() -> Callable[[str, int, int], MeasuredProbe]:
    def make(name: str, before: int, after: int) -> MeasuredProbe:
        """A probe whose target is token 1, with the tokens that both models give."""
        probe = EncodedProbe(0, name, "reasoning", "", Passage((0,), (1,)))
        return MeasuredProbe(probe, Answer((before,)), Answer((after,)), Explanation(-1))

    return make


def test_the_example_of_a_metric_counts_what_the_base_knew(
    measured: Callable[[str, int, int], MeasuredProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = run_example("metric", "lemoe.evaluation.retention", monkeypatch).score_retention
    kept, lost, unknown = measured("portability", 1, 1), measured("portability", 1, 2), measured("portability", 2, 1)
    (metric,) = score([kept, lost, unknown, measured("locality", 1, 1)], "teacher")
    assert (metric.name, metric.value, metric.n) == ("retention", 0.5, 2)
    assert score([unknown], "teacher") == []
