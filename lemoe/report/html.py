"""The report as one page: nothing is loaded, nothing runs, and all text is escaped."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from lemoe.data.counting import format_count
from lemoe.report import plots
from lemoe.report.content import Report
from lemoe.report.rounds import pick_evenly
from lemoe.report.routes import DESTINATIONS
from lemoe.report.text import format_number, format_percent, format_with_error

ROWS_SHOWN = 100  # rounds in a table
DESTINATION_NAMES = ("own expert", "another edit’s", "shut: other question", "shut: no subject")


def render_html(report: Report) -> str:
    """The page; rendering is deterministic."""
    environment = Environment(
        loader=PackageLoader("lemoe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=format_number, with_error=format_with_error, percent=format_percent, thousands="{:,}".format
    )
    environment.globals.update(
        format_count=format_count, plots=plots, destinations=tuple(zip(DESTINATIONS, DESTINATION_NAMES, strict=True))
    )
    return environment.get_template("report.html").render(report=report, rows=pick_evenly(report.rounds, ROWS_SHOWN))
