"""What `lemoe eval` measured is never lost: it is printed, and each file is written, whatever becomes of the others."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from test_cli import lemoe_command

import lemoe

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
    lemoe.edit(base, facts[:2], anchor(steps=2), tmp_path / "run")
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


def test_a_pipe_or_device_is_no_file_that_could_be_replaced(measured: tuple[Any, ...], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = lemoe_command(*measured, "--records", pipe, "--force")
    assert (result.exit_code, "exists and is not a file" in result.stderr) == (2, True)
    assert pipe.is_fifo()
