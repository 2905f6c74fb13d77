"""Edits as a table: CSV and TSV files with a header, as spreadsheets write them; and files that are no text at all."""

import csv
import io
from pathlib import Path
from typing import Any

from lemoe.errors import InputError

DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # of which the first that splits the header counts
EXPECTED = "expected JSON Lines, a JSON array, or CSV or TSV with a header such as prompt,target,subject"
OTHER_KINDS = (  # by their first bytes
    (b"PK\x03\x04", "a spreadsheet (.xlsx, .ods) or a zip archive; save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet or document (.xls, .doc); save it as CSV"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a compressed file; unpack it first"),
)


def is_table(path: Path) -> bool:
    """Whether the name says that the file is CSV or TSV."""
    return path.suffix.lower() in DELIMITERS


def check_kind(path: Path, content: bytes) -> None:
    """Refuse, in one line, a file of a kind that holds no edits as text.

    Raises:
        InputError: naming the kind, and what is read.
    """
    for opening, kind in OTHER_KINDS:
        if content.startswith(opening):
            raise InputError(f"{path}: this is {kind}; {EXPECTED}")
    if b"\0" in content and not content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as UTF-16 begins
        raise InputError(f"{path}: this is no text, there are zero bytes in it; {EXPECTED}")


def parse_table(path: Path, text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """The rows as records by column, each with its file and line, and the problems of rows that do not fit the header.

    Empty cells are left out, and so are rows without any text.

    Raises:
        InputError: if the first row is no header with `prompt` and `target` (or `target_new`).
    """
    rows = _read_rows(path, text)
    if not rows:
        raise InputError(f"{path}: no edits in it; {EXPECTED}")
    (first, header), *body = rows
    columns = [name.strip().lower() for name in header]
    if "prompt" not in columns or not {"target", "target_new"} & set(columns):
        raise InputError(f"{path}:{first}: expected a header with `prompt` and `target`, such as prompt,target,subject")
    records: list[tuple[str, Any]] = []
    problems = []
    for line, cells in body:
        if len(cells) == len(columns):
            named = zip(columns, cells, strict=True)
            records.append((f"{path}:{line}", {name: cell for name, cell in named if name and cell.strip()}))
        else:
            problems.append(f"{path}:{line}: expected {len(columns)} cells, as in the header, not {len(cells)}")
    return records, problems


def _read_rows(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """The rows that hold any text, each with the line on which it starts."""
    reader = csv.reader(io.StringIO(text), delimiter=_find_delimiter(path, text), strict=True)
    rows = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not a row of a table: {error}") from None
    return rows


def _find_delimiter(path: Path, text: str) -> str:
    """What the header's columns are separated by: spreadsheets of some countries write semicolons."""
    possible = DELIMITERS[path.suffix.lower()]
    header = text.lstrip().partition("\n")[0]
    return next((delimiter for delimiter in possible if delimiter in header), possible[0])
