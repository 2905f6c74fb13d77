"""A run's folder: whether it holds a run, and what that run was started for, so that it can be resumed.

`run.yaml` is written before anything else. It tells which rounds of the plan an unfinished run trains, which edits it
leaves out because the plan does not name them, and which adaptor it continues.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lemoe.adaptor.header import ADAPTOR_NAME
from lemoe.data.files import write_atomically
from lemoe.errors import InputError, OutputError
from lemoe.settings import Settings
from lemoe.training.methods import method_of

PLAN_NAME = "plan.yaml"
ROUNDS_NAME = "rounds"
RUN_NAME = "run.yaml"

_RUN_HEADER = "# What this run was started for; `lemoe edit --resume` goes on with it.\n"


@dataclass(frozen=True)
class RunStart:
    """What a run was started for.

    Attributes:
        round_range: indices of the rounds of its plan, from 0; None for all.
        left_out: the edits that its plan does not name: prompt and target by id.
        start: hash of the adaptor that it continues, if there is one.
    """

    round_range: range | None
    left_out: Mapping[str, str]
    start: str | None


def write_start(folder: Path, start: RunStart, *, overwrite: bool) -> None:
    """Write what the run was started for; a file that says the same stays.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    named = None if start.round_range is None else f"{start.round_range.start}-{start.round_range.stop - 1}"
    document = {"rounds": named, "left_out": dict(start.left_out), "continues": start.start}
    content = (_RUN_HEADER + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)).encode()
    path = folder / RUN_NAME
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content, overwrite=overwrite)


def read_start(folder: Path) -> RunStart | None:
    """What the run in `folder` was started for; None if there is no run.

    Raises:
        InputError: if the file that says so is damaged.
    """
    path = folder / RUN_NAME
    if not path.exists():
        return None
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        left_out, start = document["left_out"], document["continues"]
        if not isinstance(left_out, dict) or not isinstance(start, str | None):
            raise TypeError
        return RunStart(
            _parse_round_range(document["rounds"]), {str(key): str(fact) for key, fact in left_out.items()}, start
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise InputError(f"{path}: damaged, or changed by hand; `force` starts anew") from None


def _parse_round_range(named: Any) -> range | None:
    if named is None:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", named)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(named)
    return range(int(found[1]), int(found[2]) + 1)


def resumed_round_range(folder: Path, started: RunStart | None, round_range: range | None) -> range | None:
    """The indices of the rounds with which the run in `folder` goes on, when `round_range` is given.

    Raises:
        InputError: if it was started for others.
    """
    if started is None or started.round_range == round_range:
        return round_range
    if round_range is None:
        return started.round_range
    then, now = _describe_round_range(started.round_range), _describe_round_range(round_range)
    raise InputError(
        f"{folder} was started for {then}, not for {now}: leave `round_range` out to go on with the "
        "former, or give another `folder`"
    )


def _describe_round_range(round_range: range | None) -> str:
    return (
        "all rounds of its plan" if round_range is None else f"`round_range` {round_range.start}-{round_range.stop - 1}"
    )


def check_resumed_start(folder: Path, started: RunStart | None, start: str | None) -> None:
    """Refuse to resume a run on another adaptor, of the hash `start`, than the one that it continues.

    Raises:
        InputError: saying which.
    """
    if started is None or started.start == start:
        return
    if start is None:
        raise InputError(f"the run in {folder} continues an adaptor with `start`; give the same to resume it")
    continued = "continues another adaptor" if started.start else "continues no adaptor"
    raise InputError(f"the run in {folder} {continued}; resume it with the same, or give another `folder`")


def check_folder(folder: Path, *, force: bool = False, resume: bool = False) -> None:
    """Refuse early, before anything is computed, a folder that holds an earlier run.

    Raises:
        OutputError: saying how to go on.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder; give another `folder`")
    if force or resume:
        return
    if os.path.lexists(folder / ADAPTOR_NAME):
        raise OutputError(f"{folder} holds a finished run; give another `folder`, or `force` to replace it")
    if os.path.lexists(folder / PLAN_NAME):
        raise OutputError(
            f"{folder} holds an unfinished run; `resume` goes on from its finished rounds, `force` starts anew"
        )


def check_round_range(round_range: range | None, settings: Settings, *, planned: bool) -> None:
    """Refuse early, before anything is computed, rounds that cannot be trained by themselves.

    Args:
        planned: whether there is a plan file, which says what each round holds.

    Raises:
        InputError: saying what can be.
    """
    if round_range is None:
        return
    if not planned:
        raise InputError(
            "`round_range` needs `plan_file`, so that each part follows the same plan; `lemoe plan` writes one"
        )
    if round_range.start and method_of(settings).rounds_depend:
        raise InputError(
            f"`round_range` must start at 0 with preset {settings.method}: each of its rounds is trained beside those "
            "before it; rounds that `start` holds already are left out"
        )
