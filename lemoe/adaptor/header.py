"""The header of an adaptor file, read without torch: other files are refused before anything heavy is loaded."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lemoe.errors import AdaptorError

FORMAT = 3
FIRST_WITH_MEANING = 3
READABLE_FORMATS = (1, 2, 3)  # format 1 has no texts of edits, 1 and 2 no meaning of questions
ADAPTOR_NAME = "adaptor.safetensors"
METADATA_KEY = "lemoe"
HASH_KEY = "sha256"  # of all else in the file
_KEYS = {"format", "tool", "base", "settings", "rounds", HASH_KEY}


def check_adaptor(path: Path | str) -> None:
    """Refuse early what is no adaptor file of this format; `lemoe.adaptor.checkpoint` checks the rest.

    Raises:
        AdaptorError: if the file is missing, truncated, or of another kind or version.
    """
    file = adaptor_path(path)
    with open_safetensors(file, "numpy") as content:
        read_header(file, content.metadata() or {})


def adaptor_path(path: Path | str) -> Path:
    """The adaptor file itself, or the one in a run's folder."""
    path = Path(path)
    return path / ADAPTOR_NAME if path.is_dir() else path


@contextmanager
def open_safetensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file, opened by safetensors.

    Raises:
        AdaptorError: if it is missing, truncated or of another kind.
    """
    if path.exists() and not path.is_file():
        raise AdaptorError(f"{path}: not a file")  # reading a pipe or a device would never end
    try:
        with safe_open(path, framework=framework, device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise AdaptorError(f"{path}: no such file") from None
    except OSError as error:
        raise AdaptorError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise AdaptorError(f"{path}: not a whole safetensors file ({error}); copy or train it again") from None


def read_header(path: Path, stored: Mapping[str, str]) -> dict[str, Any]:
    """The adaptor's own metadata.

    Raises:
        AdaptorError: if there is none, or it is damaged or of another format.
    """
    if METADATA_KEY not in stored:
        raise AdaptorError(f"{path}: a safetensors file, but not a lemoe adaptor (no `{METADATA_KEY}` in its metadata)")
    if len(stored) > 1:
        raise AdaptorError(f"{path}: not a valid adaptor: metadata beside `{METADATA_KEY}`, which no hash covers")
    try:
        header = json.loads(stored[METADATA_KEY])
        version = header["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AdaptorError(f"{path}: its metadata is damaged") from None
    if type(version) is not int or version not in READABLE_FORMATS:
        known = ", ".join(map(str, READABLE_FORMATS))
        raise AdaptorError(f"{path}: format {version!r:.60}; this lemoe reads formats {known}. Update lemoe")
    if not isinstance(header.get("tool"), str) or not set(header) <= _KEYS:
        raise AdaptorError(f"{path}: its metadata is damaged: it holds {', '.join(sorted(header))[:200]}")
    return dict(header)
