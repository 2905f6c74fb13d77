"""A report on what was measured: one page that opens from disk, or Markdown for a pull request."""

from collections.abc import Iterable
from pathlib import Path

from lemoe.data.files import check_free, write_whole
from lemoe.errors import InputError
from lemoe.report.content import Report, report_of
from lemoe.report.html import as_html
from lemoe.report.markdown import as_markdown

__all__ = ["FORMATS", "Report", "as_html", "as_markdown", "check_reports", "report_of", "write_reports"]

FORMATS = {".html": as_html, ".md": as_markdown}


def check_reports(paths: Iterable[Path], *, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, places that no report can be written to.

    Raises:
        InputError: for a suffix that names no format.
        OutputError: if a file exists and `overwrite` is not given.
    """
    for path in paths:
        if path.suffix not in FORMATS:
            raise InputError(f"{path}: a report's name ends in {' or '.join(FORMATS)}")
        check_free(path, overwrite=overwrite)


def write_reports(report: Report, paths: Iterable[Path], *, overwrite: bool = False) -> None:
    """Write `report` to each of `paths`, in the format that its suffix names.

    Raises:
        InputError: for a suffix that names none.
        OutputError: if a file exists and `overwrite` is not given, or cannot be written.
    """
    places = list(dict.fromkeys(paths))
    check_reports(places, overwrite=overwrite)
    for path in places:
        write_whole(path, FORMATS[path.suffix](report).encode(), overwrite=overwrite)
