"""How numbers of things are put into words."""


def format_count(number: int, noun: str) -> str:
    """A number of things: `1 edit`, `1,000 edits`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def edits_in_rounds(edits: int, rounds: int) -> str:
    """`6 edits in 1 round`."""
    return f"{format_count(edits, 'edit')} in {format_count(rounds, 'round')}"
