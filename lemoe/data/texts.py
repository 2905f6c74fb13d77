"""Plain texts whose perplexity editing must not change, as in the study of model collapse (Yang et al., 2024)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lemoe.data.counting import format_count
from lemoe.data.edits import read_records
from lemoe.errors import InputError

TEXT_KEYS = ("text", "Text")


def read_texts(path: Path | str) -> list[str]:
    """The texts of a file: JSON Lines or a JSON array of texts or of objects with `text`, or plain lines (`.txt`).

    Raises:
        InputError: naming every record (the first 20) that is not a text, or the file if it has none.
    """
    path = Path(path)
    if path.suffix == ".txt":
        try:
            texts = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}") from None
    else:
        records, problems = read_records(path)
        found = [(source, _get_text(record)) for source, record in records]
        problems += [f"{source}: expected a text, or an object with `text`" for source, text in found if not text]
        if problems:
            raise InputError.from_problems(
                f"{path}: {format_count(len(problems), 'bad record')}, nothing was measured", problems
            )
        texts = [text for _, text in found]
    if not texts:
        raise InputError(f"{path}: no texts in it")
    return texts


def _get_text(record: Any) -> str:
    if isinstance(record, Mapping):
        record = next((record[key] for key in TEXT_KEYS if key in record), "")
    return record if isinstance(record, str) and record.strip() else ""
