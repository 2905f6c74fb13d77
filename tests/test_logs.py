"""`lemoe edit --log-to`: what other tools read of a run."""

import csv
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_cli import SMALL, lemoe_command

import lemoe

Run = Callable[..., Path]


@pytest.fixture
def run(tiny_folder: Callable[[str], Path], facts: list[lemoe.Edit], tmp_path: Path) -> Run:
    """Teaches four edits in two rounds, and gives the folder of the logs."""
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps({"prompt": e.prompt, "target": e.target}) + "\n" for e in facts[:4]))

    def teach(*arguments: str) -> Path:
        result = lemoe_command("edit", edits, "-m", tiny_folder("llama"), *SMALL, "-q", *arguments)
        assert result.exit_code == 0, result.output
        return tmp_path / "edits.lemoe" / "logs"

    return teach


def test_every_step_and_round_is_a_row_of_the_table_and_a_line_of_json(run: Run) -> None:
    with (run("--log-to", "csv") / "progress.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows if row["event"] == "round"] == ["1", "2"]
    assert [row["step"] for row in rows if row["event"] == "step"][:3] == ["0", "1", "2"]
    lines = [json.loads(line) for line in (run("--log-to", "json", "--force") / "progress.jsonl").open()]
    assert [(line["event"], line["round"], line["loss"]) for line in lines] == [
        (row["event"], int(row["round"]), float(row["loss"])) for row in rows
    ]
    assert {line["edits"] for line in lines if line["event"] == "round"} == {2}


def test_tensorboards_own_writer_gets_the_losses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str):
            assert folder.endswith("logs")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    stand_in: Any = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    run("--log-to", "tensorboard")
    assert written[-1][0] == "closed"
    steps = [step for name, _, step in written if name == "loss/step"]
    assert steps == list(range(len(steps)))
    assert [step for name, _, step in written if name == "edits/round"] == [1, 2]


def test_a_missing_tensorboard_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = lemoe_command("edit", "none.jsonl", "-m", "llama", "--log-to", "tensorboard")
    assert (result.exit_code, "pip install 'lemoe[tensorboard]'" in result.stderr) == (2, True)
