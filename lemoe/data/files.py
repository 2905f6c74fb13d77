"""Atomic writes: files and folders appear complete or not at all.

1. Each is made under a temporary name in the same folder, and locked as long as its writer lives.
2. It is renamed when complete.
3. A temporary name without a lock was left by a writer that was killed, and may be removed.
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

SCRATCH_SUFFIX = ".part"  # of files and folders that are being written
REPLACED_SUFFIX = ".old"  # of a folder that is being replaced
RANDOM_PATTERN = "?" * 8  # matches the random part of `tempfile` names


def write_atomically(path: Path, content: bytes | Iterable[bytes], *, overwrite: bool = False) -> None:
    """Write a file under a temporary name in the same folder, fsync it, and rename it.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    check_overwrite(path, overwrite=overwrite)
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: cannot be written: it exists and is not a file")  # a device, a folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _create_locked(partial(_make_empty_file, path)) as scratch:
            try:
                _write_and_sync(scratch, content)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _make_empty_file(path: Path) -> Path:
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SCRATCH_SUFFIX, dir=path.parent)
    os.close(handle)
    return Path(scratch)


def _write_and_sync(scratch: Path, content: bytes | Iterable[bytes]) -> None:
    with scratch.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    scratch.chmod(0o666 & ~_read_umask())


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder under a temporary name next to `folder`, locked against `remove_scratch` while open, then removed.

    Raises:
        OSError: if it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _create_locked(partial(_make_empty_folder, folder)) as scratch:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _make_empty_folder(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=SCRATCH_SUFFIX, dir=folder.parent))


def replace_folder(folder: Path, scratch: Path) -> None:
    """Rename `scratch` to `folder`; the old content is removed last.

    Raises:
        OSError: if it cannot be done.
    """
    old = scratch.with_suffix(REPLACED_SUFFIX)
    with _lock_path(folder):
        folder.rename(old)
        scratch.rename(folder)
        _remove_path(old)


def restore_replaced(folder: Path) -> None:
    """Restore `folder` if a writer was killed while replacing it, and nothing has its name."""
    for old in _find_stale(folder.parent, folder.name, REPLACED_SUFFIX):
        if not os.path.lexists(folder):
            with suppress(OSError):
                old.rename(folder)


def remove_scratch(folder: Path, name: str | None = None) -> None:
    """Remove temporary files in `folder` (or only those of its file `name`) that killed writers left.

    Files of running writers stay, as does everything on systems that cannot tell.
    """
    for suffix in (SCRATCH_SUFFIX, REPLACED_SUFFIX) if name else (SCRATCH_SUFFIX,):
        for path in _find_stale(folder, name, suffix):
            _remove_path(path)


def _find_stale(folder: Path, name: str | None, suffix: str) -> Iterator[Path]:
    """Temporary files and folders that no running writer has locked; they are locked here while yielded."""
    for path in sorted(folder.glob(f".{glob.escape(name)}.{RANDOM_PATTERN}{suffix}" if name else f".*{suffix}")):
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


def _remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _create_locked(make: Callable[[], Path]) -> Iterator[Path]:
    """The file or folder that `make` makes under a new temporary name, locked while open."""
    while True:
        made = make()
        lock = ExitStack()
        with suppress(FileNotFoundError):
            lock.enter_context(_lock_path(made))
        with lock:
            if made.exists():  # else another process removed it as stale before it was locked
                yield made
                return


@contextmanager
def _lock_path(path: Path) -> Iterator[None]:
    """Lock a file or folder while open, at most until this process ends; not every system has locks."""
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


def check_overwrite(path: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that exists, before anything is computed.

    Raises:
        OutputError: if it exists and `overwrite` is not given.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists; give another path, or `overwrite` to replace it")


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every system can open a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
