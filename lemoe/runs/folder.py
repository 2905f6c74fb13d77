"""A run's folder: whether it holds a run, and what that was started for, so that it can go on with the same.

`run.yaml` is written before anything else. An unfinished run knows from it which rounds of its plan it is for, which
edits it leaves out because its plan does not name them, and which adaptor it continues.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lemoe.adaptor.header import ADAPTOR_NAME
from lemoe.data.files import write_whole
from lemoe.errors import InputError, OutputError
from lemoe.settings import Settings
from lemoe.training.methods import method_of

PLAN_NAME = "plan.yaml"
ROUNDS_NAME = "rounds"
RUN_NAME = "run.yaml"

_HEAD = "# What this run was started for; `lemoe edit --resume` goes on with it.\n"


@dataclass(frozen=True)
class RunStart:
    """What a run was started for.

    Attributes:
        places: the rounds of its plan, from 0; None for all.
        left_out: the edits that its plan does not name: prompt and target by id.
        start: hash of the adaptor that it continues, if there is one.
    """

    places: range | None
    left_out: Mapping[str, str]
    start: str | None


def write_start(folder: Path, start: RunStart, *, overwrite: bool) -> None:
    """Write what the run was started for; a file that says the same stays.

    Raises:
        OutputError: if the file exists and `overwrite` is not given, or cannot be written.
    """
    named = None if start.places is None else f"{start.places.start}-{start.places.stop - 1}"
    document = {"rounds": named, "left_out": dict(start.left_out), "continues": start.start}
    content = (_HEAD + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)).encode()
    path = folder / RUN_NAME
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content, overwrite=overwrite)


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
        return RunStart(_places(document["rounds"]), {str(key): str(fact) for key, fact in left_out.items()}, start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        raise InputError(f"{path}: damaged, or changed by hand; --force starts anew") from None


def _places(named: Any) -> range | None:
    if named is None:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", named)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(named)
    return range(int(found[1]), int(found[2]) + 1)


def resumed_places(folder: Path, started: RunStart | None, places: range | None) -> range | None:
    """The rounds with which the run in `folder` goes on, when `places` are asked for.

    Raises:
        InputError: if it was started for others.
    """
    if started is None or started.places == places:
        return places
    if places is None:
        return started.places
    raise InputError(
        f"{folder} was started for {_named(started.places)}, not for {_named(places)}: leave --rounds out to go on "
        "with the former, or give another folder with -o"
    )


def _named(places: range | None) -> str:
    return "all rounds of its plan" if places is None else f"--rounds {places.start}-{places.stop - 1}"


def check_resumed_start(folder: Path, started: RunStart | None, start: str | None) -> None:
    """Refuse to resume a run on another adaptor, of the hash `start`, than the one that it continues.

    Raises:
        InputError: saying which.
    """
    if started is None or started.start == start:
        return
    if start is None:
        raise InputError(f"the run in {folder} continues an adaptor with --from; give the same to resume it")
    known = "continues another adaptor" if started.start else "continues no adaptor"
    raise InputError(f"the run in {folder} {known}; resume it with what it was started with, or give another -o")


def check_folder(folder: Path, *, force: bool = False, resume: bool = False) -> None:
    """Refuse early, before anything is computed, a folder that holds an earlier run.

    Raises:
        OutputError: saying how to go on.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder; give another one with -o")
    if force or resume:
        return
    if os.path.lexists(folder / ADAPTOR_NAME):
        raise OutputError(f"{folder} holds a finished run; give another folder with -o, or --force to replace it")
    if os.path.lexists(folder / PLAN_NAME):
        raise OutputError(
            f"{folder} holds an unfinished run; --resume goes on from its finished rounds, --force starts anew"
        )


def check_places(places: range | None, settings: Settings, *, planned: bool) -> None:
    """Refuse early, before anything is computed, rounds that cannot be trained by themselves.

    Args:
        planned: whether there is a plan file, which says what each place holds.

    Raises:
        InputError: saying what can be.
    """
    if places is None:
        return
    if not planned:
        raise InputError("--rounds needs --plan, so that each part follows the same plan; lemoe plan writes one")
    if places.start and method_of(settings).rounds_depend:
        raise InputError(
            f"--rounds must start at 0 with preset {settings.method}: each of its rounds is trained beside those "
            "before it; rounds that --from holds already are left out"
        )
