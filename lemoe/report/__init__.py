"""A report on what was measured: one page that opens from disk, or Markdown for a pull request."""

from collections.abc import Iterable
from pathlib import Path

from lemoe.data.files import check_overwrite, write_atomically
from lemoe.errors import InputError
from lemoe.report.content import Report, build_report
from lemoe.report.html import render_html
from lemoe.report.markdown import render_markdown

__all__ = ["FORMATS", "Report", "build_report", "check_reports", "render_html", "render_markdown", "write_reports"]

FORMATS = {".html": render_html, ".md": render_markdown}


def check_reports(paths: Iterable[Path], *, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, paths that no report can be written to.

    Raises:
        InputError: for a suffix that names no format.
        OutputError: if a file exists and `overwrite` is not given.
    """
    for path in paths:
        if path.suffix not in FORMATS:
            raise InputError(f"{path}: a report's name ends in {' or '.join(FORMATS)}")
        check_overwrite(path, overwrite=overwrite)


def write_reports(report: Report, paths: Iterable[Path], *, overwrite: bool = False) -> None:
    """Write `report` to each of `paths`, in the format that its suffix names.

    Raises:
        InputError: for a suffix that names none.
        OutputError: if a file exists and `overwrite` is not given, or cannot be written.
    """
    targets = list(dict.fromkeys(paths))
    check_reports(targets, overwrite=overwrite)
    for path in targets:
        write_atomically(path, FORMATS[path.suffix](report).encode(), overwrite=overwrite)
