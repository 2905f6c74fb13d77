"""What the terminal shows: stages, live progress, tables. Progress goes to stderr, results to stdout."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lemoe.data.counting import format_count
from lemoe_cli.timing import start_phase
from lemoe_cli.wording import name_options

if TYPE_CHECKING:
    from lemoe.adaptor.state import RoundRecord
    from lemoe.training.steps import Step

notes = Console(stderr=True, highlight=False, markup=False, emoji=False)
results = Console(highlight=False, soft_wrap=False, markup=False, emoji=False)


def strip_control(text: str) -> str:
    """Text without control sequences: control and formatting characters become spaces."""
    return "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in text)


def print_note(text: str) -> None:
    """One line on stderr."""
    notes.print(strip_control(name_options(text)))


@contextmanager
def show_stage(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner while something takes time; yields a function that changes its text."""
    start_phase(text)
    with _show_text(text, quiet=quiet) as change_text:

        def change_phase(text: str) -> None:
            start_phase(text)
            change_text(text)

        yield change_phase
    start_phase("what follows")


@contextmanager
def _show_text(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    if quiet:
        yield lambda text: None
        return
    if not notes.is_terminal:
        yield print_note
        return
    with notes.status(Text(strip_control(text))) as status:  # rich takes a plain string for markup here
        yield lambda text: status.update(Text(strip_control(text)))


@contextmanager
def show_counter(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields a function of (done, total)."""
    start_phase(text)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, disable=quiet or not notes.is_terminal, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)
    start_phase("showing and writing")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table on stdout; the first `left` columns are text, the others numbers."""
    if title:
        results.print("\n".join(map(strip_control, title.split("\n"))), style="bold")
    shown = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, name in enumerate(columns):
        shown.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(strip_control, row))
    results.print(shown)


class EditProgress:
    """Live view of a run: edits done and time left, the round, its step and loss; then the final reliability check."""

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("edits"),
            TimeRemainingColumn(),
            console=notes,
            disable=quiet or not notes.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("planning", total=None)
        self._done = 0.0
        self._size = 0
        self._share = 0.0
        self._label = ""
        self._checking = False

    def __enter__(self) -> "EditProgress":
        self._progress.start()
        start_phase("planning")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def planned(self, rounds: int, edits: int) -> None:
        self._progress.update(self._task, description=format_count(rounds, "round"), total=edits)

    def round_started(self, number: int, total: int, edits: int) -> None:
        self._label = f"round {number}/{total}"
        start_phase(self._label)
        self._size, self._share = edits, 0.0

    def step(self, step: "Step") -> None:
        self._share = max(
            self._share, self._size * min(1.0, step.number / step.total)
        )  # a second try takes nothing back
        text = f"{self._label}  step {step.number:>3}/{step.total}  loss {step.loss:6.3f}"
        self._progress.update(self._task, description=text, completed=int(self._done + self._share))

    def round_done(self, number: int, total: int, record: "RoundRecord", *, kept: bool) -> None:
        self._done += len(record.edits)
        self._progress.update(self._task, completed=int(self._done))
        how = "kept from the unfinished run" if kept else f"{record.steps} steps, loss {record.loss:.3f}"
        if record.retried and not kept:
            how += f", {record.retried} needed more"
        self.note(f"round {number}/{total}: {format_count(len(record.edits), 'edit')}, {how}")

    def edits_checked(self, done: int, total: int) -> None:
        if not self._checking:
            self._checking = True
            start_phase("checking every edit")
            self._progress.reset(self._task, description="checking every edit", total=total)
        self._progress.update(self._task, completed=done)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._progress.console.print(strip_control(name_options(text)))


def size_text(count: int) -> str:
    """Bytes for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def duration_text(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
