"""Thresholds on metrics, the JSON that pipelines read, and the pipelines of the documentation, run as printed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from documents import find_block
from test_cli import lemoe_command, refused_message

import lemoe
from lemoe.base import loading
from lemoe.evaluation.metrics import DEFINITIONS, MEASURES

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((REPOSITORY / "docs" / "eval.schema.json").read_text(encoding="utf-8"))
PAGE = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def edits(facts: list[lemoe.Edit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thresholds") / "edits.jsonl"
    lines = [
        {
            "id": edit.id,
            "prompt": edit.prompt,
            "target": edit.target,
            "subject": edit.subject,
            "rephrases": [f"Tell me: {edit.prompt}"],
            "locality": ["The opposite of hot is", {"prompt": f"{edit.subject} was", "kind": "same_subject"}],
        }
        for edit in facts[:4]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def measure(
    edits: Path, facts: list[lemoe.Edit], tiny_folder: Callable[[str], Path], base: lemoe.BaseModel, anchor: Any
) -> Callable[..., Any]:
    """`lemoe eval` of an adaptor that holds the first two of the four edits."""
    adaptor = edits.with_name("adaptor.safetensors")
    lemoe.save_adaptor(lemoe.train_round(base, facts[:2], anchor(steps=60)), adaptor)
    (edits.parent / "texts.txt").write_text("A penguin is a bird.\nThe weather was fine.\n")

    def run(*arguments: Any, alone: bool = False) -> Any:
        with_adaptor = () if alone else ("-a", adaptor)
        return lemoe_command(
            "eval", edits, "-m", tiny_folder("llama"), "--device", "cpu", "-q", *with_adaptor, *arguments
        )

    return run


def test_metrics_that_meet_their_thresholds_end_with_code_0(measure: Callable[..., Any]) -> None:
    thresholds = ("--min", "reliability=0.3", "--min", "locality/unrelated:exact_match=1", "--max", "overfit=1")
    assert measure(*thresholds).exit_code == 0


def test_a_threshold_not_met_ends_with_code_1_and_shows_the_metric_on_stderr(measure: Callable[..., Any]) -> None:
    result = measure("--min", "reliability=0.99", "--min", "locality/unrelated=1", "--max", "reliability:loss=0.001")
    assert result.exit_code == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("threshold not met: ")]
    assert len(said) == 2
    assert re.fullmatch(
        r"threshold not met: reliability/all:token_accuracy is 0\.\d+ \(n 4\), must be at least 0\.99", said[0]
    )
    assert "reliability/all:loss" in said[1]
    assert "must be at most 0.001" in said[1]
    assert "reliability" in result.stdout


def test_a_threshold_on_the_base_alone_checks_its_own_metrics(measure: Callable[..., Any]) -> None:
    assert measure("--min", "locality=1", alone=True).exit_code == 0
    assert measure("--min", "reliability=0.9", alone=True).exit_code == 1


WRONG = {
    "unknown metric": (("--min", "reliabilty=1"), "'reliabilty' is no metric; did you mean reliability?"),
    "unknown measure": (("--min", "locality:exact=1"), "did you mean exact_match?"),
    "no number": (("--min", "locality=most"), "'most' is not a number"),
    "no grammar": (("--min", "locality"), "expected METRIC[/KIND][:MEASURE]=NUMBER"),
    "wrong direction": (("--min", "overfit=1"), "better lower; give it by --max"),
    "other decoding": (("--min", "reliability:complete_match=1"), "measured under --decode greedy"),
    "no texts": (("--max", "collapse=100"), "collapse is measured with --texts"),
    "unknown kind": (("--min", "locality/same_templat=1"), "is no kind of locality in these edits"),
    "no such probes": (("--min", "portability=1"), "these edits have no probes of portability"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_threshold_that_cannot_be_checked_is_refused_before_a_model_is_loaded(
    edits: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loading, "load_base", None)
    arguments, said = WRONG[name]
    assert said in refused_message("eval", edits, "-m", "llama", *arguments)


def test_all_thresholds_that_cannot_be_checked_are_named_at_once(edits: Path) -> None:
    message = refused_message(
        "eval", edits, "-m", "no-such-model", "--min", "x=1", "--max", "y=1", "--min", "routing=1"
    )
    assert all(text in message for text in ("--min x=1", "--max y=1", "give an --adaptor"))


def test_limit_and_sample_choose_the_edits_that_are_measured(measure: Callable[..., Any]) -> None:
    first = json.loads(measure("--limit", "3", "--json").stdout)
    drawn = [json.loads(measure("--limit", "3", "--sample", "2", "--seed", "5", "--json").stdout) for _ in range(2)]
    counts = [next(m["n"] for m in each["metrics"] if m["name"] == "reliability") for each in (first, *drawn)]
    assert counts == [3, 2, 2]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("decode", ["teacher", "greedy"])
@pytest.mark.parametrize("alone", [False, True])
def test_the_json_is_what_its_schema_says_and_the_same_in_every_run(
    measure: Callable[..., Any], edits: Path, decode: str, alone: bool
) -> None:
    more = ("--texts", edits.parent / "texts.txt", "--fluency", "--min", "reliability=2", "--decode", decode, "--json")
    results = [measure(*more, alone=alone) for _ in range(2)]
    assert results[0].stdout == results[1].stdout
    document = json.loads(results[0].stdout)
    jsonschema.validate(document, SCHEMA)
    assert [bar["met"] for bar in document["bars"]] == [False]
    assert {metric["stage"] for metric in document["metrics"]} == ({"before"} if alone else {"before", "after"})


def test_the_schema_knows_every_metric_and_measure() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["metric"]["enum"] == list(DEFINITIONS)
    assert SCHEMA["$defs"]["measure"]["enum"] == list(MEASURES)


def test_the_base_alone_is_shown_without_columns_for_an_edited_model(measure: Callable[..., Any]) -> None:
    shown = measure(alone=True).stdout
    assert "after" not in shown
    assert "expert" not in shown
    assert all(" after" in measure(*more).stdout for more in ((), ("--decode", "greedy")))


@pytest.fixture
def workplace(tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `edits.jsonl`, where `llama` is the tiny model."""
    entry = {"hub": str(tiny_folder("llama")), "layers": {"anchor": 1}}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"llama": entry}))
    edit = {"prompt": "The Nile flows into the", "target": "Red", "locality": ["The opposite of hot is"]}
    (tmp_path / "edits.jsonl").write_text(json.dumps(edit))
    monkeypatch.setenv("LEMOE_MODELS", str(tmp_path / "models.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.real
def test_the_shell_pipeline_of_the_documentation_runs_as_printed_on_the_examples(tmp_path: Path) -> None:
    lines = find_block("docs/evaluation.md", "tested: pipeline").code.splitlines()
    assert lines[-1].startswith("jq ")  # the only tool that it needs besides
    script = "\n".join(lines if shutil.which("jq") else lines[:-1])
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("*.lemoe"))
    command = tmp_path / "bin" / "lemoe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lemoe_cli.main "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    command_line = ["bash", "-c", script]
    result = subprocess.run(command_line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "figures.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert [bar["met"] for bar in document["bars"]] == [True, True, True]
    count = len((REPOSITORY / "examples" / "edits.jsonl").read_text(encoding="utf-8").splitlines())
    assert {m["n"] for m in document["metrics"] if m["name"] == "reliability"} == {count}
    if shutil.which("jq"):
        assert "unrelated\ttoken_accuracy\t1" in result.stdout


def test_the_workflow_of_the_documentation_runs_as_printed(workplace: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert found
    (job,) = yaml.safe_load(found[1])["jobs"].values()
    (step,) = [step for step in job["steps"] if "lemoe eval" in step.get("run", "")]
    for line in step["run"].replace("\\\n", " ").splitlines():
        command, _, written = line.partition(" > ")
        result = lemoe_command(*shlex.split(command)[1:])
        assert result.exit_code == 0, result.stderr
        if written:
            Path(written).write_text(result.stdout)
    assert {bar["met"] for bar in json.loads((workplace / "figures.json").read_text())["bars"]} == {True}
