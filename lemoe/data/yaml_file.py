"""YAML that a user wrote: read in full or refused in one line, however odd it is."""

from pathlib import Path
from typing import Any

import yaml

from lemoe.errors import InputError

DEEPEST = 100  # levels; none of our files needs more than a few, and Python's stack takes some hundreds

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NO_VALUE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)  # what PyYAML makes of `!!int ""`


def read_yaml(path: Path) -> Any:
    """The one document of a file; None if it is empty.

    Raises:
        InputError: if the file cannot be read, or is no YAML that makes plain values.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def parse_yaml(text: str) -> Any:
    """The one document of a text.

    Raises:
        ValueError: in one line, if it is no YAML that makes plain values, or nested more than `DEEPEST` levels deep,
            which would take libyaml, and Python with it, off its feet.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested too deeply, more than {DEEPEST} levels")
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except _NO_VALUE as error:
        raise ValueError(" ".join(str(error).split()) or "a value is not what its tag says") from None
