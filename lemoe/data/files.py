"""Files and folders that appear whole or not at all.

Each is made under a temporary name beside its own, and locked for as long as its writer lives: what lies there without
a lock was left by one that was killed.
"""

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from lemoe.errors import OutputError

if sys.platform != "win32":
    import fcntl

SCRATCH = ".part"  # end of the names under which files are written
REPLACED = ".old"  # end of the name of a folder that is being replaced
RANDOM = "?" * 8  # what `tempfile` puts before these


def write_whole(path: Path, content: bytes | Iterable[bytes], *, overwrite: bool = False) -> None:
    """Write through a temporary name in the same folder, fsync, and rename.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    check_free(path, overwrite=overwrite)
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: cannot be written: there is something that is no file")  # a device, a folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held_while_made(partial(_empty_file, path)) as scratch:
            try:
                _fill(scratch, content)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _empty_file(path: Path) -> Path:
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SCRATCH, dir=path.parent)
    os.close(handle)
    return Path(scratch)


def _fill(scratch: Path, content: bytes | Iterable[bytes]) -> None:
    with scratch.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    scratch.chmod(0o666 & ~_umask())


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder under a temporary name beside `folder`, kept from `remove_scratch` while open; then it goes.

    Raises:
        OSError: if it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _held_while_made(partial(_empty_folder, folder)) as scratch:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _empty_folder(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=SCRATCH, dir=folder.parent))


def replace_folder(folder: Path, scratch: Path) -> None:
    """Give `scratch` the name of `folder`, whose content goes last.

    Raises:
        OSError: if it cannot be done.
    """
    old = scratch.with_suffix(REPLACED)
    with _held(folder):
        folder.rename(old)
        scratch.rename(folder)
        _remove(old)


def restore_replaced(folder: Path) -> None:
    """Give a folder its name back that a writer was replacing when it was killed, if nothing has that name."""
    for old in _left_behind(folder.parent, folder.name, REPLACED):
        if not os.path.lexists(folder):
            with suppress(OSError):
                old.rename(folder)


def remove_scratch(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed left under temporary names in `folder`, or left there of its file `name`.

    What a writer at work has there stays, and so does everything where the system cannot tell.
    """
    for ending in (SCRATCH, REPLACED) if name else (SCRATCH,):
        for path in _left_behind(folder, name, ending):
            _remove(path)


def _left_behind(folder: Path, name: str | None, ending: str) -> Iterator[Path]:
    """What has temporary names and no writer that lives."""
    for path in sorted(folder.glob(f".{glob.escape(name)}.{RANDOM}{ending}" if name else f".*{ending}")):
        if sys.platform == "win32":
            if path.is_file():  # which cannot be removed while a writer has it open
                yield path
            continue
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path
            finally:
                os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _held_while_made(make: Callable[[], Path]) -> Iterator[Path]:
    """What `make` makes under a new temporary name, locked while open."""
    while True:
        made = make()
        held = ExitStack()
        with suppress(FileNotFoundError):
            held.enter_context(_held(made))
        with held:
            if made.exists():  # else it was taken for left behind before it was locked
                yield made
                return


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep a file or folder locked while open, or until this process ends; not every system can."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, an output that exists.

    Raises:
        OutputError: saying how to go on.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; give another path, or --force to replace it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every system lets a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
