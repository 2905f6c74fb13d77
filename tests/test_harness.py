"""General ability through lm-evaluation-harness, on two small tasks of our own; nothing is fetched."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import lemoe
from lemoe.evaluation.harness import TaskMetric
from lemoe_cli.main import cli

REPOSITORY = Path(__file__).resolve().parents[1]
TASKS = REPOSITORY / "tests" / "tasks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The extra is there, its data sets are found, and no hub can be reached."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'lemoe[harness]'")
    import datasets

    def unexpected(*args: object) -> None:
        raise AssertionError("a task of our own opened a connection")

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(socket.socket, "connect", unexpected)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.fixture(scope="module")
def state(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: Callable[..., lemoe.Settings]) -> lemoe.AdaptorState:
    return lemoe.train_round(base, facts[:4], anchor(steps=40, round_size=4))


def find_metric(metrics: list[TaskMetric], task: str, metric: str) -> TaskMetric:
    (found,) = [each for each in metrics if (each.task, each.metric) == (task, metric)]
    return found


@pytest.mark.usefixtures("harness")
def test_a_task_about_the_edits_changes_and_one_about_other_things_does_not(
    base: lemoe.BaseModel, state: lemoe.AdaptorState
) -> None:
    metrics = lemoe.evaluate_tasks(base, state, ["edited_facts", "other_facts"], lemoe.TaskOptions(tasks_path=TASKS))
    edited, other = (find_metric(metrics, task, "acc") for task in ("edited_facts", "other_facts"))
    assert edited.before < 1.0
    assert (edited.after, edited.higher_is_better, edited.n) == (1.0, True, 4)
    assert edited.stderr == 0.0
    assert other.after == other.before
    spread = find_metric(metrics, "other_facts", "brier_score")
    assert spread.after == spread.before
    assert spread.higher_is_better is False


@pytest.mark.usefixtures("harness")
def test_the_model_answers_before_and_after_as_if_nothing_had_been_measured(
    base: lemoe.BaseModel, state: lemoe.AdaptorState, facts: list[lemoe.Edit]
) -> None:
    settings = (base.tokenizer.padding_side, base.tokenizer.pad_token, base.tokenizer.truncation_side)
    before = lemoe.answer(base, facts[0].prompt)
    lemoe.evaluate_tasks(base, state, ["edited_facts"], lemoe.TaskOptions(tasks_path=TASKS, limit=1))
    assert lemoe.answer(base, facts[0].prompt) == before
    assert settings == (base.tokenizer.padding_side, base.tokenizer.pad_token, base.tokenizer.truncation_side)
    with lemoe.insert(base, state):
        assert lemoe.answer(base, facts[0].prompt).strip() == facts[0].target


@pytest.mark.usefixtures("harness")
def test_without_an_adaptor_the_base_alone_is_measured(base: lemoe.BaseModel) -> None:
    (accuracy,) = [
        each
        for each in lemoe.evaluate_tasks(base, None, ["other_facts"], lemoe.TaskOptions(tasks_path=TASKS))
        if each.metric == "acc"
    ]
    assert accuracy.after is None
    assert accuracy.stderr is not None
    assert 0.0 <= accuracy.before <= 1.0


@pytest.mark.usefixtures("harness")
def test_an_unknown_task_is_named(base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))  # its own are slow to read
    with pytest.raises(lemoe.LemoeError, match="no_such_task"):
        lemoe.evaluate_tasks(base, None, ["other_facts", "no_such_task"], lemoe.TaskOptions(tasks_path=TASKS))


@pytest.mark.usefixtures("harness")
def test_a_task_whose_data_is_missing_is_named(base: lemoe.BaseModel, tmp_path: Path) -> None:
    text = (TASKS / "other_facts.yaml").read_text()
    (tmp_path / "broken.yaml").write_text(text.replace("tests/tasks/other_facts.jsonl", "nowhere.jsonl"))
    with pytest.raises(lemoe.LemoeError, match="task other_facts: cannot be loaded"):
        lemoe.evaluate_tasks(base, None, ["other_facts"], lemoe.TaskOptions(tasks_path=tmp_path))


def eval_command(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def files(facts: list[lemoe.Edit], state: lemoe.AdaptorState, tmp_path: Path) -> tuple[Path, Path]:
    """Edits, and the adaptor that holds them."""
    edits, adaptor = tmp_path / "edits.jsonl", tmp_path / "adaptor.safetensors"
    edits.write_text("".join(json.dumps({"prompt": f.prompt, "target": f.target}) + "\n" for f in facts[:2]))
    lemoe.save_adaptor(state, adaptor)
    return edits, adaptor


@pytest.mark.usefixtures("harness")
def test_the_command_shows_tasks_beside_its_other_metrics(
    files: tuple[Path, Path], tiny_folder: Callable[[str], Path]
) -> None:
    edits, adaptor = files
    arguments = [edits, "-m", tiny_folder("llama"), "-a", adaptor, "--tasks", "edited_facts,other_facts"]
    arguments += ["--tasks-path", TASKS]
    shown = eval_command(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "reliability" in shown.stdout
    assert "edited_facts" in shown.stdout
    document = json.loads(eval_command(*arguments, "--json", "-q").stdout)
    (accuracy,) = [f for f in document["tasks"] if (f["task"], f["metric"]) == ("edited_facts", "acc")]
    assert accuracy["after"] == 1.0


def test_tasks_without_the_extra_say_what_to_install(base: lemoe.BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(lemoe.LemoeError, match=r"pip install 'lemoe\[harness\]'"):
        lemoe.evaluate_tasks(base, None, ["edited_facts"], lemoe.TaskOptions(tasks_path=TASKS))
