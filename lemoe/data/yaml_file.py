"""YAML files of users: read completely, or refused with a one-line error."""

from pathlib import Path
from typing import Any

import yaml

from lemoe.errors import InputError

MAX_DEPTH = 100  # levels; our files need a few, and Python's stack holds some hundreds

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NO_VALUE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)  # what PyYAML raises for `!!int ""`


def read_yaml(path: Path) -> Any:
    """The document of a file; None if it is empty.

    Raises:
        InputError: if the file cannot be read, or is not one valid YAML document.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The document of a text.

    Raises:
        ValueError: in one line, if it is not one valid YAML document, or is nested more than `MAX_DEPTH` levels deep,
            which would crash libyaml and Python.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"nested too deeply, more than {MAX_DEPTH} levels")
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except _NO_VALUE as error:
        raise ValueError(" ".join(str(error).split()) or "a value is not what its tag says") from None
