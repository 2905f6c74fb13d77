"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lemoe.errors import OutputError

SCRATCH = ".part"  # end of the names under which files are written


def write_whole(path: Path, content: bytes | Iterable[bytes], *, overwrite: bool = False) -> None:
    """Write through a temporary name in the same folder, fsync, and rename.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    check_free(path, overwrite=overwrite)
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: cannot be written: there is something that is no file")  # a device, a folder
    scratch: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SCRATCH, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o666 & ~_umask())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if scratch:
            with suppress(OSError):
                Path(scratch).unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Remove what writers that were killed left under temporary names in `folder`."""
    for path in folder.glob(f".*{SCRATCH}"):
        with suppress(OSError):
            path.unlink()


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
