"""What `lemoe eval` measured is never lost: it is printed, and each file is written, whatever becomes of the others."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from test_cli import lemoe_command

import lemoe
from lemoe.evaluation.made_up import add_made_up_probes

SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture
def measured(
    base: lemoe.BaseModel,
    tiny_folder: Callable[[str], Path],
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    tmp_path: Path,
) -> tuple[Any, ...]:
    """The arguments that measure two edits."""
    lemoe.edit(base, facts[:2], tmp_path / "run", anchor(steps=2))
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps({"prompt": e.prompt, "target": e.target}) + "\n" for e in facts[:2]))
    return ("eval", edits, "-a", tmp_path / "run", "-m", tiny_folder("llama"), "--device", "cpu", "-q")


def fill_disk(monkeypatch: pytest.MonkeyPatch, name: str = "") -> None:
    """Nothing more can be written whole, or no file called `name`."""
    rename = os.replace

    def full(old: Any, new: Any) -> None:
        if name in Path(new).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(old, new)

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("given", [["--report", "a.html"], ["--report", "a.md"], ["--records", "a.jsonl"], ["--card"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_metrics_are_printed_though_no_file_can_be_written(
    measured: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], as_json: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = lemoe_command(*measured).stdout
    fill_disk(monkeypatch)
    result = lemoe_command(*measured, *given, *(["--json"] if as_json else []))
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert (json.loads(result.stdout)["metrics"] != []) if as_json else (result.stdout == expected)


def test_each_file_is_written_though_another_cannot_be(
    measured: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    fill_disk(monkeypatch, "a.html")
    reports = ("--report", "a.html", "--report", "a.md", "--records", "a.jsonl")
    result = lemoe_command(*measured, *reports, "--max", "reliability:perplexity=1")
    assert result.exit_code == 2
    assert "a.html: cannot be written" in result.stderr
    assert "threshold not met" in result.stderr
    assert {path.name for path in tmp_path.glob("a.*")} == {"a.md", "a.jsonl"}


def test_the_files_are_written_though_the_metrics_cannot_be_printed(
    measured: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*given: Any, **named: Any) -> None:
        if not named.get("err"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        echo(*given, **named)

    monkeypatch.chdir(tmp_path)
    echo = click.echo
    monkeypatch.setattr(click, "echo", full)
    result = lemoe_command(*measured, "--json", "--records", "a.jsonl")
    assert result.exit_code == 2
    assert "cannot be printed: No space left on device" in result.stderr
    assert Path("a.jsonl").read_text().count("\n") > 0


def test_what_was_not_measured_is_said(measured: tuple[Any, ...]) -> None:
    result = lemoe_command(*[word for word in measured if word != "-q"])
    assert "no rephrases, no locality prompts in this file: generality and locality are unknown" in " ".join(
        result.stderr.split()
    )
    assert "--probe auto" in result.stderr
    assert "generality" not in result.stdout
    document = json.loads(lemoe_command(*measured, "--json").stdout)
    assert document["settings"]["missing_probes"] == ["generality", "locality"]
    assert "unknown" not in lemoe_command(*measured).stderr


def test_probes_are_made_up_where_that_is_asked_for_and_are_marked(measured: tuple[Any, ...]) -> None:
    shown = lemoe_command(*measured, "--probe", "auto")
    rows = [line.split()[:2] for line in shown.stdout.splitlines()]
    assert all([name, "made_up"] in rows for name in ("generality", "locality"))
    assert ["reliability", "all"] in rows
    document = json.loads(lemoe_command(*measured, "--probe", "auto", "--json").stdout)
    kinds = {metric["name"]: metric["kind"] for metric in document["metrics"] if metric["kind"] != "all"}
    assert (kinds["generality"], kinds["locality"]) == ("made_up", "made_up")
    assert document == json.loads(lemoe_command(*measured, "--probe", "auto", "--json").stdout)


def test_thresholds_are_checked_on_made_up_probes_where_those_are_asked_for(measured: tuple[Any, ...]) -> None:
    given = ("--min", "generality=0", "--min", "locality/made_up=0")
    met = lemoe_command(*measured, "--probe", "auto", *given)
    assert met.exit_code == 0, met.stderr
    assert lemoe_command(*measured, "--probe", "auto", "--min", "locality=2").exit_code == 1
    refused = lemoe_command(*measured, *given)
    assert refused.exit_code == 2
    assert "these edits have no probes of generality" in refused.stderr


def test_an_edits_own_probes_stay_where_others_are_made_up(base: lemoe.BaseModel, facts: list[lemoe.Edit]) -> None:
    own = (lemoe.Probe("Say it", facts[0].target, "paraphrase"),)
    first, second = add_made_up_probes(base, [replace(facts[0], rephrases=own), facts[1]])
    assert first.rephrases == own
    assert {probe.kind for probe in (*first.locality, *second.rephrases, *second.locality)} == {"made_up"}
    assert all(probe.target == facts[1].target and probe.prompt != facts[1].prompt for probe in second.rephrases)
    assert all(str(facts[1].subject) in probe.prompt and probe.target is None for probe in second.locality)


def test_the_files_that_were_written_are_named(
    measured: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [word for word in measured if word != "-q"]
    result = lemoe_command(*arguments, "--report", "a.md", "--records", "a.jsonl", "--card")
    written = [line for line in result.stderr.splitlines() if line.startswith("written: ")]
    assert written == ["written: a.jsonl", "written: a.md", f"written: {tmp_path / 'run' / 'README.md'}"]


def test_a_pipe_or_device_is_no_file_that_could_be_replaced(measured: tuple[Any, ...], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = lemoe_command(*measured, "--records", pipe, "--force")
    assert (result.exit_code, "exists and is not a file" in result.stderr) == (2, True)
    assert pipe.is_fifo()
