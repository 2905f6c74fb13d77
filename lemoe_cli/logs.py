"""`lemoe edit --log-to`: the course of training as rows for other tools, beside what the terminal shows."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from lemoe.errors import InputError
from lemoe_cli.ui import EditProgress

if TYPE_CHECKING:
    from lemoe.adaptor.state import RoundRecord
    from lemoe.training.steps import Step

COLUMNS = ("event", "round", "step", "loss", "edits", "missed")
FOLDER = "logs"  # in that of the run


class Log(Protocol):
    """Takes rows with the keys of `COLUMNS`; what does not apply is None."""

    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLog:
    """One JSON object per line."""

    def __init__(self, folder: Path):
        self._file: TextIO = (folder / "progress.jsonl").open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class CsvLog:
    """One table, with a header."""

    def __init__(self, folder: Path):
        path = folder / "progress.csv"
        new = not path.exists()
        self._file: TextIO = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if new:
            self._writer.writeheader()

    def write(self, row: dict[str, Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorboardLog:
    """Event files of TensorBoard: the loss by step over all rounds, and that of each round."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._steps = 0

    def write(self, row: dict[str, Any]) -> None:
        if row["event"] == "step":
            self._writer.add_scalar("loss/step", row["loss"], self._steps)
            self._steps += 1
        else:
            for name in ("loss", "edits", "missed"):
                self._writer.add_scalar(f"{name}/round", row[name], row["round"])

    def close(self) -> None:
        self._writer.close()


LOGS: dict[str, Callable[[Path], Log]] = {"tensorboard": TensorboardLog, "csv": CsvLog, "json": JsonLog}


def check_log(kind: str | None) -> None:
    """Refuse, before anything is trained, a log whose package is not installed."""
    if kind == "tensorboard":
        from importlib.util import find_spec

        if find_spec("tensorboard") is None:
            raise InputError("--log-to tensorboard needs tensorboard: pip install 'lemoe[tensorboard]'")


class LoggedProgress(EditProgress):
    """The live view of a run, which also logs every step and round; of rounds trained elsewhere, the rounds alone."""

    def __init__(self, folder: Path, kind: str, *, quiet: bool):
        super().__init__(quiet=quiet)
        self._folder = folder / FOLDER
        self._kind = kind
        self._log: Log | None = None
        self._round = 0

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._log is not None:
            self._log.close()

    def round_started(self, number: int, total: int, edits: int) -> None:
        super().round_started(number, total, edits)
        self._round = number

    def step(self, step: "Step") -> None:
        super().step(step)
        self._write(event="step", round=self._round, step=step.number, loss=step.loss)

    def round_done(self, number: int, total: int, record: "RoundRecord", *, kept: bool) -> None:
        super().round_done(number, total, record, kept=kept)
        if not kept:
            missed = len(record.missed or ())
            self._write(event="round", round=number, loss=record.loss, edits=len(record.edits), missed=missed)

    def _write(self, **given: Any) -> None:
        if self._log is None:  # the run makes its folder first
            self._folder.mkdir(parents=True, exist_ok=True)
            self._log = LOGS[self._kind](self._folder)
        self._log.write({name: given.get(name) for name in COLUMNS})
