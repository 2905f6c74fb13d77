"""The report as one page: nothing is loaded, nothing runs, and all text is escaped."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from lemoe.report import plots
from lemoe.report.content import Report
from lemoe.report.rounds import spread
from lemoe.report.routes import DESTINATIONS
from lemoe.report.text import counted, figure, percent, with_error

ROWS_SHOWN = 100  # rounds in a table
DESTINATION_NAMES = ("own expert", "another edit’s", "shut: other question", "shut: no subject")


def as_html(report: Report) -> str:
    """The page; equal reports give equal pages."""
    environment = Environment(
        loader=PackageLoader("lemoe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(figure=figure, with_error=with_error, percent=percent, thousands="{:,}".format)
    environment.globals.update(
        counted=counted, plots=plots, destinations=tuple(zip(DESTINATIONS, DESTINATION_NAMES, strict=True))
    )
    return environment.get_template("report.html").render(report=report, rows=spread(report.rounds, ROWS_SHOWN))
