"""What killed writers leave behind: the next one to the same place puts it away, and lets writers at work alone."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lemoe
from lemoe.adaptor.merging import merge
from lemoe.data.files import remove_scratch, write_whole
from lemoe.exporting.folder import export

SettingsOf = Callable[..., lemoe.Settings]

FILE = """
import sys, time
from pathlib import Path
from lemoe.data.files import write_whole

def content():
    yield b"half"
    print("at work", flush=True)
    time.sleep(600)

write_whole(Path(sys.argv[1]), content(), overwrite=True)
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
def at_work(code: str, place: Path) -> Iterator[None]:
    """Another process that has half of `place`, killed in the end."""
    writer = subprocess.Popen([sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True)
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


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_merge_puts_away_what_a_killed_one_left_and_no_other_file(adaptor: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "merged.safetensors"
    with at_work(FILE, place):
        (working,) = hidden(place.parent)
        merge([adaptor], place)
        assert hidden(place.parent) == [working]
    for name in (".other.safetensors.abcdefgh.part", ".merged.safetensors.notes.old"):
        (place.parent / name).touch()
    merge([adaptor], place, overwrite=True)
    assert hidden(place.parent) == [".merged.safetensors.notes.old", ".other.safetensors.abcdefgh.part"]


def test_an_export_puts_away_what_a_killed_one_left(
    adaptor: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "out" / "whole"
    with at_work(FOLDER, place):
        (working,) = hidden(place.parent)
        remove_scratch(place.parent, place.name)
        assert [path.name for path in (place.parent / working).iterdir()] == ["half"]
    export(str(tiny_folder("llama")), [adaptor], place)
    assert [path.name for path in place.parent.iterdir()] == ["whole"]


def test_a_folder_that_was_being_replaced_when_its_writer_was_killed_is_there_again(
    adaptor: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "out" / "whole"
    place.mkdir(parents=True)
    (place / "mine").touch()
    with at_work(REPLACING, place):
        assert not place.exists()
    with pytest.raises(lemoe.LemoeError, match="exists"):
        export(str(tiny_folder("llama")), [adaptor], place)
    assert [path.name for path in place.iterdir()] == ["mine"]
    export(str(tiny_folder("llama")), [adaptor], place, overwrite=True)
    assert (place / "adaptor.safetensors").is_file()
    assert [path.name for path in place.parent.iterdir()] == ["whole"]


def test_a_run_lets_alone_what_another_process_writes_into_its_folder(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    place = tmp_path / "run" / "merged.safetensors"
    with at_work(FILE, place):
        (working,) = hidden(place.parent)
        lemoe.edit(base, facts[:2], anchor(steps=1), place.parent)
        assert working in hidden(place.parent)


def test_a_file_that_is_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", broken())
    write_whole(tmp_path / "other", [b"a", b"b"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
