"""Scratch files of killed writers: the next writer of the same path removes them, but not those of running writers."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lemoe
from lemoe.adaptor.merging import merge_adaptors
from lemoe.data.files import remove_scratch, write_atomically
from lemoe.exporting.folder import ExportOptions, export_model

SettingsOf = Callable[..., lemoe.Settings]

FILE = """
import sys, time
from pathlib import Path
from lemoe.data.files import write_atomically

def content():
    yield b"half"
    print("at work", flush=True)
    time.sleep(600)

write_atomically(Path(sys.argv[1]), content(), overwrite=True)
"""
FOLDER = """
import sys, time
from pathlib import Path
from lemoe.data.files import scratch_folder

with scratch_folder(Path(sys.argv[1])) as scratch:
    (scratch / "half").touch()
    print("at work", flush=True)
    time.sleep(600)
"""
REPLACING = """
import sys, time
from pathlib import Path
from lemoe.data import files

def stop(path):
    print("at work", flush=True)
    time.sleep(600)

with files.scratch_folder(Path(sys.argv[1])) as scratch:
    rename = Path.rename
    Path.rename = lambda old, new: stop(old) if old == scratch else rename(old, new)
    files.replace_folder(Path(sys.argv[1]), scratch)
"""


@contextmanager
def start_writer(code: str, path: Path) -> Iterator[None]:
    """Another process that has written half of `path`, killed on exit."""
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "at work\n"
        yield
    finally:
        writer.kill()
        writer.communicate()


@pytest.fixture
def adaptor(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> Path:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(base, facts[:2], anchor(steps=1)), path)
    return path


def hidden_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_merge_removes_the_scratch_file_of_a_killed_one_and_no_other_file(adaptor: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "merged.safetensors"
    with start_writer(FILE, target):
        (working,) = hidden_names(target.parent)
        merge_adaptors([adaptor], target)
        assert hidden_names(target.parent) == [working]
    for name in (".other.safetensors.abcdefgh.part", ".merged.safetensors.notes.old"):
        (target.parent / name).touch()
    merge_adaptors([adaptor], target, overwrite=True)
    assert hidden_names(target.parent) == [".merged.safetensors.notes.old", ".other.safetensors.abcdefgh.part"]


def test_an_export_removes_the_scratch_folder_of_a_killed_one(
    adaptor: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    target = tmp_path / "out" / "whole"
    with start_writer(FOLDER, target):
        (working,) = hidden_names(target.parent)
        remove_scratch(target.parent, target.name)
        assert [path.name for path in (target.parent / working).iterdir()] == ["half"]
    export_model(str(tiny_folder("llama")), [adaptor], target)
    assert [path.name for path in target.parent.iterdir()] == ["whole"]


def test_a_folder_that_was_being_replaced_when_its_writer_was_killed_is_restored(
    adaptor: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    target = tmp_path / "out" / "whole"
    target.mkdir(parents=True)
    (target / "mine").touch()
    with start_writer(REPLACING, target):
        assert not target.exists()
    with pytest.raises(lemoe.LemoeError, match="exists"):
        export_model(str(tiny_folder("llama")), [adaptor], target)
    assert [path.name for path in target.iterdir()] == ["mine"]
    export_model(str(tiny_folder("llama")), [adaptor], target, ExportOptions(overwrite=True))
    assert (target / "adaptor.safetensors").is_file()
    assert [path.name for path in target.parent.iterdir()] == ["whole"]


def test_a_run_keeps_what_another_process_writes_into_its_folder(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    target = tmp_path / "run" / "merged.safetensors"
    with start_writer(FILE, target):
        (working,) = hidden_names(target.parent)
        lemoe.edit(base, facts[:2], target.parent, anchor(steps=1))
        assert working in hidden_names(target.parent)


def test_a_file_that_is_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    def interrupted_content() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted_content())
    write_atomically(tmp_path / "other", [b"a", b"b"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
