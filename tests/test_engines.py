"""Rounds trained by Ray workers: the same files as in one process, whatever happens to the workers."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import lemoe
from lemoe.adaptor.state import RoundRecord
from lemoe.errors import InputError, ModelError
from lemoe.runs.progress import NullProgress

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lemoe[ray]'")

from lemoe.runs.engines.ray import RayEngine

SettingsOf = Callable[..., lemoe.Settings]


class WorkerKiller(NullProgress):
    """Kills every worker when the first round is done."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def round_done(self, number: int, total: int, record: RoundRecord, *, kept: bool) -> None:
        if self.killed:
            return
        for process in psutil.Process().children(recursive=True):
            if "RoundWorker" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                self.killed.append(process.pid)


@pytest.fixture
def engine(tiny_folder: Callable[[str], Path]) -> RayEngine:
    """Two workers on this machine, with the tiny llama."""
    return RayEngine(partial(lemoe.load_base, str(tiny_folder("llama"))), workers=2)


@pytest.fixture
def use_two_threads() -> Iterator[None]:
    """Another number of threads than workers would have by themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("use_two_threads")
def test_workers_that_are_killed_change_no_byte_of_what_one_process_gives(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, engine: RayEngine, tmp_path: Path
) -> None:
    settings = anchor(round_size=1)
    lemoe.edit(base, facts, tmp_path / "local", settings)
    killer = WorkerKiller()
    lemoe.edit(base, facts, tmp_path / "ray", settings, engine=engine, progress=killer)
    assert killer.killed
    assert read_files(tmp_path / "ray") == read_files(tmp_path / "local")


def test_an_unfinished_run_is_resumed_by_workers_and_what_goes_wrong_there_is_said_here(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    engine: RayEngine,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    start = lemoe.train_round(base, facts[:1], anchor())
    report = lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(start=start))
    whole = read_files(tmp_path / "run")
    report.path.unlink()
    (tmp_path / "run" / "rounds" / "0002.safetensors").unlink()
    other = RayEngine(partial(lemoe.load_base, str(tiny_folder("mistral"))), workers=1)
    with pytest.raises(ModelError, match="a worker has another base model"):
        lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(start=start, resume=True), engine=other)
    lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(start=start, resume=True), engine=engine)
    assert read_files(tmp_path / "run") == whole


def test_an_address_that_does_not_answer_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, but not listened at
        with pytest.raises(InputError, match="no Ray cluster answers there"):
            RayEngine(lemoe.load_base, f"127.0.0.1:{free.getsockname()[1]}")


def test_rounds_that_depend_on_each_other_are_not_given_to_workers(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, engine: RayEngine, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="preset paper trains each round beside those before it"):
        lemoe.edit(base, facts, tmp_path / "run", paper(), engine=engine)
