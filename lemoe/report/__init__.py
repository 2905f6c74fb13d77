"""A report on what was measured: one page that opens from disk, or Markdown for a pull request."""

from pathlib import Path

from lemoe.errors import InputError
from lemoe.files import write_whole
from lemoe.report.content import Report, report_of
from lemoe.report.html import as_html
from lemoe.report.markdown import as_markdown

__all__ = ["FORMATS", "Report", "as_html", "as_markdown", "report_of", "write_report"]

FORMATS = {".html": as_html, ".md": as_markdown}


def write_report(report: Report, path: Path, *, overwrite: bool = False) -> None:
    """Write `report` to `path`, in the format that its suffix names.

    Raises:
        InputError: for a suffix that names none.
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a report is written as {' or '.join(FORMATS)}")
    write_whole(path, FORMATS[path.suffix](report).encode(), overwrite=overwrite)
