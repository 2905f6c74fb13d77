"""The main job: plan, train one expert a round, and leave files that people can keep.

A run's folder holds `plan.yaml`, one state a round under `rounds/`, each written as soon as the round is done,
`adaptor.safetensors`, the stack of all rounds and of the adaptor that the run started from, and its card, `README.md`.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lemoe.adaptor import AdaptorState, check_settings, round_id, stack
from lemoe.card import write_card
from lemoe.checkpoint import ADAPTOR_NAME, load_adaptor, save_adaptor
from lemoe.edits import Edit, Round
from lemoe.engines import Engine
from lemoe.engines.local import LocalEngine
from lemoe.errors import AdaptorError, InputError, LemoeError, OutputError
from lemoe.evaluation import evaluate
from lemoe.files import remove_scratch, write_whole
from lemoe.insertion import check_base
from lemoe.listening import Listener, Silent
from lemoe.memory import fitting_tokens, free_memory
from lemoe.methods import check_adds_experts, parent_of, rounds_depend
from lemoe.models import BaseModel
from lemoe.planning import load_plan, plan, rounds_of, save_plan
from lemoe.settings import Settings
from lemoe.structure import FFNSite
from lemoe.training import encode_edits

PLAN_NAME = "plan.yaml"
ROUNDS_NAME = "rounds"
LOCK_NAME = ".lock"


@dataclass(frozen=True)
class EditReport:
    """What a run did.

    Attributes:
        state: the stacked adaptor.
        path, size: of its file, bytes.
        taught: the edits that are in the new rounds.
        reliability_before, reliability_after: share of their target tokens that the model predicts.
        exact_before, exact_after: share of them whose whole target it predicts.
        seconds: for training.
        unreached: numbers of the new rounds that ended above the loss target.
        missed: names of the edits whose own prompt was not answered when their round ended.
    """

    state: AdaptorState
    path: Path
    size: int
    taught: int
    reliability_before: float
    reliability_after: float
    exact_before: float
    exact_after: float
    seconds: float
    unreached: tuple[int, ...]
    missed: tuple[str, ...]


def edit(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    folder: Path | str,
    *,
    source: str = "",
    plan_file: Path | str | None = None,
    places: range | None = None,
    start: AdaptorState | None = None,
    force: bool = False,
    resume: bool = False,
    allow_base_mismatch: bool = False,
    engine: Engine | None = None,
    listener: Listener | None = None,
) -> EditReport:
    """Teach `edits` to an adaptor of `base` and write it under `folder`.

    Args:
        source: name of the edits file, for the plan.
        plan_file: rounds to follow; planned afresh if None.
        places: train only the rounds at these places of the plan file, from 0; the adaptors of all places, stacked in
            their order, are the adaptor of one run.
        start: an earlier adaptor to continue; its experts stay as they are, and edits it holds are left out.
        force: write into a folder that holds an earlier run, replacing its files.
        resume: keep the rounds that an unfinished run of the same edits and settings left in `folder`.
        allow_base_mismatch: continue `start` on a base that it was not made for; the new rounds record how it differs.
        engine: what trains the rounds; this process if None.

    Raises:
        InputError: for edits or a plan that cannot be used, or places that cannot be trained by themselves.
        AdaptorError: if `start` belongs to another base model.
        OutputError: if the folder holds an earlier run, or another is at work in it, or it cannot be written.
    """
    check_adds_experts(settings)
    check_places(places, settings, planned=plan_file is not None)
    engine, listener = engine or LocalEngine(), listener or Silent()
    check_engine(engine, settings)
    folder = Path(folder)
    if start:
        for difference in check_base(base, start, allow=allow_base_mismatch):
            listener.note(f"another base than the adaptor was made for: {difference}")
        check_settings(start, settings)
    with _locked(folder):
        return _edit(
            base,
            edits,
            settings,
            folder,
            source,
            plan_file,
            places,
            start,
            engine,
            listener,
            force=force,
            resume=resume,
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`; a run that dies lets go of it."""
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(f"{folder}: another run is at work there; wait for it, or give another folder") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        for place in (folder, folder / ROUNDS_NAME):
            remove_scratch(place)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
        lock.release()


def _edit(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    folder: Path,
    source: str,
    plan_file: Path | str | None,
    places: range | None,
    start: AdaptorState | None,
    engine: Engine,
    listener: Listener,
    *,
    force: bool,
    resume: bool,
) -> EditReport:
    """See `edit`."""
    layer = start.base.layer if start else settings.layer_of(len(base.layers), base.source.layers)
    site = base.site(layer, settings.layer_path)
    encode_edits(base, edits)
    if resume and plan_file is None and (folder / PLAN_NAME).exists():
        plan_file = folder / PLAN_NAME
    new = _not_yet_taught(edits, start, listener)
    if plan_file is not None:
        rounds = _follow(plan_file, places, edits, new, folder, overwrite=force or resume)
    else:
        rounds = _plan(base, new, settings, folder, source, listener, overwrite=force or resume)
    listener.planned(len(rounds), sum(len(round_.edits) for round_ in rounds))
    settings = _fitting(base, site, settings, listener)
    began = time.monotonic()
    trained = _train_rounds(base, rounds, settings, folder, start, engine, listener, force=force, resume=resume)
    seconds = time.monotonic() - began
    state = stack([start, *trained] if start else trained)
    for earlier, later in state.replaced:
        listener.note(f"edit {earlier.id} is superseded: {later.id} answers its question now")
    path = folder / ADAPTOR_NAME
    save_adaptor(state, path, overwrite=force or resume)
    if force:
        _remove_leftovers(folder, rounds)
    write_card(folder, base, state)
    taught = [edit for round_ in rounds for edit in round_.edits]
    measured = evaluate(
        base,
        state,
        taught,
        only=("reliability",),
        batch_tokens=settings.batch_tokens,
        allow_base_mismatch=True,  # which `edit` has refused unless it was asked for
    )
    return EditReport(
        state=state,
        path=path,
        size=path.stat().st_size,
        taught=len(taught),
        reliability_before=measured.value("reliability", stage="before"),
        reliability_after=measured.value("reliability"),
        exact_before=measured.value("reliability", "exact_match", stage="before"),
        exact_after=measured.value("reliability", "exact_match"),
        seconds=seconds,
        unreached=tuple(
            round_.number
            for round_, state in zip(rounds, trained, strict=True)
            if not state.rounds[0].loss < settings.loss_target
        ),
        missed=tuple(name for state in trained for name in state.rounds[0].missed or ()),
    )


def _fitting(base: BaseModel, site: FFNSite, settings: Settings, listener: Listener) -> Settings:
    """The settings with batches that fit into the free memory."""
    tokens = fitting_tokens(base, site, settings.batch_tokens)
    if tokens < settings.batch_tokens:
        free = free_memory(base.devices) >> 20
        listener.note(f"{free:,} MiB of memory are free: batches of {tokens} tokens, not {settings.batch_tokens}")
    return replace(settings, batch_tokens=tokens)


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
    if places.start and rounds_depend(settings):
        raise InputError(
            f"--rounds must start at 0 with preset {settings.method}: each of its rounds is trained beside those "
            "before it; rounds that --from holds already are left out"
        )


def check_engine(engine: Engine, settings: Settings) -> None:
    """Refuse early to train rounds at once that depend on each other.

    Raises:
        InputError: saying which engine trains them.
    """
    if rounds_depend(settings) and not isinstance(engine, LocalEngine):
        raise InputError(f"preset {settings.method} trains each round beside those before it: take --engine local")


def _remove_leftovers(folder: Path, rounds: Sequence[Round]) -> None:
    """Round files of an earlier run in the same folder, which `force` replaced."""
    numbers = {round_.number for round_ in rounds}
    for path in (folder / ROUNDS_NAME).glob("[0-9]*.safetensors"):
        if path.stem.isdigit() and int(path.stem) not in numbers:
            path.unlink()


def _not_yet_taught(edits: Sequence[Edit], start: AdaptorState | None, listener: Listener) -> list[Edit]:
    known = start.answering if start else frozenset()
    new = [edit for edit in edits if edit.digest not in known]
    if not new:
        raise InputError(f"all {len(edits)} edits are already in the adaptor to continue; there is nothing to teach")
    if len(new) < len(edits):
        listener.note(f"{len(edits) - len(new)} edits are already in the adaptor and are left out")
    return new


def _follow(
    plan_file: Path | str,
    places: range | None,
    edits: Sequence[Edit],
    new: Sequence[Edit],
    folder: Path,
    *,
    overwrite: bool,
) -> list[Round]:
    """The rounds at these places of a plan file, without the edits that are taught already."""
    planned = load_plan(plan_file, edits)
    if places is None:
        places = range(len(planned))
    if not 0 <= places.start < places.stop <= len(planned):
        wanted_rounds = f"--rounds {places.start}-{places.stop - 1}"
        raise InputError(f"{plan_file}: {wanted_rounds} is not in it: it has rounds 0 to {len(planned) - 1}")
    wanted = {edit.id for edit in new}
    rounds = [Round(n + 1, len(planned), [edit for edit in planned[n] if edit.id in wanted]) for n in places]
    rounds = [round_ for round_ in rounds if round_.edits]
    if not rounds:
        raise InputError(f"{plan_file}: these rounds are already in the adaptor; there is nothing to teach")
    content = Path(plan_file).read_bytes()
    if not (folder / PLAN_NAME).exists() or (folder / PLAN_NAME).read_bytes() != content:
        write_whole(folder / PLAN_NAME, content, overwrite=overwrite)
    return rounds


def _plan(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    folder: Path,
    source: str,
    listener: Listener,
    *,
    overwrite: bool,
) -> list[Round]:
    planned = plan(base, edits, settings)
    for conflict in planned.conflicts:
        if conflict.relation != "contradiction":
            listener.note(f"{conflict.earlier} is left out: {conflict.relation} by {conflict.later}")
    write_whole(folder / PLAN_NAME, save_plan(planned, edits, source).encode(), overwrite=overwrite)
    rounds = rounds_of(planned, edits)
    return [Round(number, len(rounds), members) for number, members in enumerate(rounds, 1)]


def _train_rounds(
    base: BaseModel,
    rounds: Sequence[Round],
    settings: Settings,
    folder: Path,
    start: AdaptorState | None,
    engine: Engine,
    listener: Listener,
    *,
    force: bool,
    resume: bool,
) -> list[AdaptorState]:
    """The states of all rounds, in order, each written as soon as it is there."""
    before = start
    states: dict[int, AdaptorState] = {}
    for group in [[round_] for round_ in rounds] if rounds_depend(settings) else [rounds]:
        kept = _all_finished(base, group, settings, folder, before) if resume else {}
        for round_ in group:
            if round_.number in kept:
                listener.round_done(round_.number, round_.of, kept[round_.number].rounds[0], kept=True)
        missing = [round_ for round_ in group if round_.number not in kept]
        states |= kept
        for round_, state in engine.train(base, missing, settings, before, listener):
            _check_converged(round_, state)
            save_adaptor(state, _file_of(folder, round_), overwrite=force or resume)
            states[round_.number] = state
            listener.round_done(round_.number, round_.of, state.rounds[0], kept=False)
        if rounds_depend(settings):
            latest = [states[round_.number] for round_ in group]
            before = stack([before, *latest] if before else latest)
    return [states[round_.number] for round_ in rounds]


def _check_converged(round_: Round, state: AdaptorState) -> None:
    loss = state.rounds[0].loss
    if not math.isfinite(loss):
        raise LemoeError(f"round {round_.number} diverged (loss {loss}); lower --learning-rate")


def _file_of(folder: Path, round_: Round) -> Path:
    return folder / ROUNDS_NAME / f"{round_.number:04d}.safetensors"


def _all_finished(
    base: BaseModel, rounds: Sequence[Round], settings: Settings, folder: Path, before: AdaptorState | None
) -> dict[int, AdaptorState]:
    """The rounds, by number, that an interrupted run has finished."""
    found = {r.number: _finished(base, _file_of(folder, r), r.edits, settings, before) for r in rounds}
    return {number: state for number, state in found.items() if state is not None}


def _finished(
    base: BaseModel, path: Path, members: Sequence[Edit], settings: Settings, before: AdaptorState | None
) -> AdaptorState | None:
    """The round's state from an interrupted run; None if it is not there, or damaged.

    Raises:
        OutputError: if it is another round than would be trained now.
    """
    if not path.exists():
        return None
    try:
        state = load_adaptor(path)
    except AdaptorError:
        return None
    resolved = replace(settings, layer=state.base.layer)
    there = base.fingerprint(state.base.layer, settings.layer_path)
    expected = round_id(there, base.tokenizer.chat_template, resolved, members, parent_of(settings, before))
    if [record.id for record in state.rounds] != [expected]:
        raise OutputError(f"{path} was trained on other edits or with other settings; --force starts anew")
    return state
