"""How texts and numbers are put into words on a report."""

import math
import unicodedata

from lemoe.evaluation.metrics import Metric

TEXT_SHOWN = 300  # characters of a prompt or an answer
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # characters that act, or have no shape
_SPACES = "\t\n\r"
_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # without which some scripts are misspelt


def clean_text(text: str, limit: int = TEXT_SHOWN) -> str:
    """Text on one line, without control characters; what is beyond `limit` characters is counted."""
    kept = "".join(_replace_hidden(char) for char in text[:limit]).strip()
    left = len(text) - limit
    return f"{kept}… ({left:,} more characters)" if left > 0 else kept


def _replace_hidden(char: str) -> str:
    if char in _SPACES:
        return " "
    hidden = unicodedata.category(char) in _HIDDEN and char not in _JOINERS
    return "\N{REPLACEMENT CHARACTER}" if hidden else char


def format_number(value: float) -> str:
    """A number with its significant digits."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:,.1f}"


def format_with_error(metric: Metric | None) -> str:
    """A metric's value with its standard error, where it has one."""
    if metric is None:
        return "–"
    return (
        format_number(metric.value)
        if metric.stderr is None
        else f"{format_number(metric.value)} ±{format_number(metric.stderr)}"
    )


def format_percent(share: float) -> str:
    """A share in whole percent; small and large shares are never rounded to 0 or 100 %."""
    if 0 < share < 0.005 or 0.995 < share < 1:
        return "<1 %" if share < 0.5 else ">99 %"
    return f"{share:.0%}".replace("%", " %")
