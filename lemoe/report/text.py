"""How texts and numbers are put into words on a report."""

import math
import unicodedata

from lemoe.evaluation.metrics import Metric

TEXT_SHOWN = 300  # characters of a prompt or an answer
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # characters that act, or have no shape
_SPACES = "\t\n\r"
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # without which some scripts are misspelt


def shown(text: str, limit: int = TEXT_SHOWN) -> str:
    """Text that a page shows and never obeys, on one line; what is beyond `limit` characters is counted."""
    kept = "".join(_visible(char) for char in text[:limit]).strip()
    left = len(text) - limit
    return f"{kept}… ({left:,} more characters)" if left > 0 else kept


def _visible(char: str) -> str:
    if char in _SPACES:
        return " "
    hidden = unicodedata.category(char) in _HIDDEN and char not in _JOINERS
    return "\N{REPLACEMENT CHARACTER}" if hidden else char


def figure(value: float) -> str:
    """A number with as many digits as say something."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:,.1f}"


def with_error(metric: Metric | None) -> str:
    """A figure with its standard error, where it has one."""
    if metric is None:
        return "–"
    return figure(metric.value) if metric.stderr is None else f"{figure(metric.value)} ±{figure(metric.stderr)}"


def percent(share: float) -> str:
    """A share in whole percent; what is nearly none or nearly all does not round to it."""
    if 0 < share < 0.005 or 0.995 < share < 1:
        return "<1 %" if share < 0.5 else ">99 %"
    return f"{share:.0%}".replace("%", " %")


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
