"""Every public name has an example in its docstring, and the examples run: on a tiny model that is called llama."""

import doctest
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

import lemoe

EDITS = (REPOSITORY / "examples" / "edits.jsonl").read_text("utf-8").splitlines()[:3]
NAMES = [name for name in lemoe.__all__ if name != "__version__"]
OF_HARNESS = ("TaskMetric", "TaskOptions", "evaluate_tasks")


def find_example(name: str) -> doctest.DocTest:
    """The example in the docstring of a public name, without those of its methods."""
    documented = getattr(lemoe, name)
    return doctest.DocTestParser().get_doctest(documented.__doc__ or "", {}, name, None, None)


@pytest.fixture(scope="module")
def models_file(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own models, among which llama is tiny."""
    path = tmp_path_factory.mktemp("examples") / "models.yaml"
    path.write_text(f'llama: {{hub: "{tiny_folder("llama").as_posix()}", layers: {{anchor: 1, paper: 1}}}}\n')
    return path


@pytest.fixture(scope="module")
def run_folder(base: lemoe.BaseModel, models_file: Path) -> Path:
    """A run of the example's edits."""
    folder = models_file.parent / "edits.lemoe"
    lemoe.edit(base, [*map(json.loads, EDITS)], folder, lemoe.Settings(layer=1))
    return folder


@pytest.fixture
def where_examples_run(models_file: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with `edits.jsonl`, `edits.lemoe` and `tasks`."""
    monkeypatch.setenv("LEMOE_MODELS", str(models_file))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.jsonl").write_text("\n".join(EDITS), encoding="utf-8")
    shutil.copytree(run_folder, tmp_path / "edits.lemoe")
    shutil.copytree(REPOSITORY / "tests" / "tasks", tmp_path / "tasks")


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name: str) -> None:
    assert re.search(r"^ *Example:$", getattr(lemoe, name).__doc__ or "", re.MULTILINE)
    assert find_example(name).examples


@pytest.mark.usefixtures("where_examples_run")
@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name: str) -> None:
    if name in OF_HARNESS:
        pytest.importorskip("lm_eval", reason="needs the extra: pip install 'lemoe[harness]'")
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(find_example(name), out=said.append)
    assert not said, "".join(said)
