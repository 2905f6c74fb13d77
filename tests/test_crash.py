"""Runs that are killed, stopped, or share a folder: what is on disk stays valid, and no finished round is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import lemoe
from lemoe.errors import OutputError
from lemoe.runs.edit import LOCK_NAME

TESTS = Path(__file__).parent
SettingsOf = Callable[..., lemoe.Settings]
PYTHON = (sys.executable, "-c", "from lemoe_cli.main import cli; cli()")
SMALL = ("--layer", "1", "--round-size", "2", "--device", "cpu")


def test_runs_that_are_killed_at_random_moments_end_as_if_they_never_were() -> None:
    script = [sys.executable, str(TESTS / "benchmarks" / "crash.py"), "--kills", "4", "--seed", "7"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 runs of 20 rounds end bit-identical, 0 rounds lost" in done.stdout


def test_two_runs_do_not_write_into_one_folder(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        FileLock(folder / LOCK_NAME),
        pytest.raises(OutputError, match="another run is at work there"),
    ):
        lemoe.edit(base, facts[:2], folder, anchor())
    lemoe.edit(base, facts[:2], folder, anchor())
    assert not (folder / LOCK_NAME).exists()


def test_the_scratch_file_of_a_killed_writer_is_removed(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    left = tmp_path / "run" / "rounds" / ".0001.safetensors.abc.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a file")
    lemoe.edit(base, facts[:2], tmp_path / "run", anchor())
    assert sorted(path.name for path in (tmp_path / "run" / "rounds").iterdir()) == ["0001.safetensors"]


def test_a_run_that_cannot_start_leaves_no_folder(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    with pytest.raises(lemoe.LemoeError):
        lemoe.edit(base, facts[:2], tmp_path / "run", anchor(layer_path="nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_round_is_trained_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    report = lemoe.edit(base, facts[:4], tmp_path / "run", anchor())
    whole = report.path.read_bytes()
    first = tmp_path / "run" / "rounds" / "0001.safetensors"
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    lemoe.edit(base, facts[:4], tmp_path / "run", anchor(), lemoe.EditOptions(resume=True))
    assert report.path.read_bytes() == whole


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interr")]
)
def test_a_run_that_is_stopped_by_a_signal_says_how_to_resume(
    tiny_folder: Callable[[str], Path], tmp_path: Path, number: int, code: int, word: str
) -> None:
    lines = [
        f'{{"prompt": "The city where Ada {letter}stone lives is", "target": "Rome", "subject": "Ada {letter}stone"}}'
        for letter in "BCDFGHJKLMNPQRST"
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    arguments = ["edit", tmp_path / "edits.jsonl", "--model", tiny_folder("llama"), *SMALL, "--steps", "400"]
    run = subprocess.Popen(
        [*PYTHON, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    rounds = tmp_path / "edits.lemoe" / "rounds"
    deadline = time.monotonic() + 300
    while run.poll() is None and not list(rounds.glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert word in said
    assert "--resume goes on from them" in said
    assert "Traceback" not in said
    finished = list(rounds.iterdir())
    assert finished
    for path in finished:
        lemoe.load_adaptor(path)
    assert not (tmp_path / "edits.lemoe" / LOCK_NAME).exists()
