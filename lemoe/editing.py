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
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from lemoe.adaptor import AdaptorState, RoundRecord, check_base, check_settings, round_id, stack
from lemoe.card import write_card
from lemoe.checkpoint import ADAPTOR_NAME, AdaptorFile, load_adaptor, save_adaptor
from lemoe.edits import Edit, Round
from lemoe.engines import Engine
from lemoe.engines.local import LocalEngine
from lemoe.errors import AdaptorError, InputError, LemoeError, OutputError
from lemoe.evaluation import evaluate
from lemoe.files import remove_scratch, write_whole
from lemoe.listening import Listener, Silent
from lemoe.memory import fitting_tokens, free_memory
from lemoe.merging import write_stack
from lemoe.methods import check_adds_experts, parent_of, rounds_depend
from lemoe.models import BaseModel
from lemoe.planning import load_plan, plan, rounds_of, save_plan
from lemoe.settings import Settings
from lemoe.structure import FFNSite
from lemoe.training import encode_edits

PLAN_NAME = "plan.yaml"
ROUNDS_NAME = "rounds"
LOCK_NAME = ".lock"
DIGITS = 4  # of a round's number in its file's name, unless the plan has more rounds
EXPERT_CACHE = 256 << 20  # bytes of experts that are kept in memory while a run's edits are asked in the end


@dataclass(frozen=True)
class EditReport:
    """What a run did.

    Attributes:
        path, size: of the stacked adaptor's file, bytes.
        rounds: how many it holds.
        taught: the edits that are in the new rounds.
        reliability_before, reliability_after: share of their target tokens that the model predicts.
        exact_before, exact_after: share of them whose whole target it predicts.
        seconds: for training.
        unreached: numbers of the new rounds that ended above the loss target.
        missed: names of the edits whose own prompt was not answered when their round ended.
    """

    path: Path
    size: int
    rounds: int
    taught: int
    reliability_before: float
    reliability_after: float
    exact_before: float
    exact_after: float
    seconds: float
    unreached: tuple[int, ...]
    missed: tuple[str, ...]

    @cached_property
    def state(self) -> AdaptorState:
        """The stacked adaptor, read from its file when it is first asked for."""
        return load_adaptor(self.path)


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
    layer = start.base.layer if start else settings.layer_of(len(base.layers), base.source.layers)
    site = base.site(layer, settings.layer_path)
    with _locked(folder):
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
        records = _train_rounds(base, rounds, settings, folder, start, engine, listener, force=force, resume=resume)
        seconds = time.monotonic() - began
        _write_adaptor(base, rounds, folder, start, listener, overwrite=force or resume)
        if force:
            _remove_leftovers(folder, rounds)
        return _report(base, folder / ADAPTOR_NAME, rounds, records, settings, seconds, listener)


def _write_adaptor(
    base: BaseModel,
    rounds: Sequence[Round],
    folder: Path,
    start: AdaptorState | None,
    listener: Listener,
    *,
    overwrite: bool,
) -> None:
    """Stack what the run started from and the files of its rounds, with a card beside."""
    files = [AdaptorFile(_file_of(folder, round_)) for round_ in rounds]
    state = write_stack([start, *files] if start else files, folder / ADAPTOR_NAME, overwrite=overwrite)
    for earlier, later in state.replaced:
        listener.note(f"edit {earlier.id} is superseded: {later.id} answers its question now")
    write_card(folder, base, state)


def _report(
    base: BaseModel,
    path: Path,
    rounds: Sequence[Round],
    records: Sequence[RoundRecord],
    settings: Settings,
    seconds: float,
    listener: Listener,
) -> EditReport:
    """What the rounds, with their `records`, have taught the adaptor at `path`."""
    taught = [edit for round_ in rounds for edit in round_.edits]
    adaptor = AdaptorFile(path)
    measured = evaluate(
        base,
        adaptor,
        taught,
        only=("reliability",),
        batch_tokens=settings.batch_tokens,
        expert_cache=EXPERT_CACHE,
        allow_base_mismatch=True,  # which `edit` has refused unless it was asked for
        on_progress=listener.asked,
    )
    return EditReport(
        path=path,
        size=path.stat().st_size,
        rounds=len(adaptor.state.rounds),
        taught=len(taught),
        reliability_before=measured.value("reliability", stage="before"),
        reliability_after=measured.value("reliability"),
        exact_before=measured.value("reliability", "exact_match", stage="before"),
        exact_after=measured.value("reliability", "exact_match"),
        seconds=seconds,
        unreached=tuple(
            round_.number
            for round_, record in zip(rounds, records, strict=True)
            if not record.loss < settings.loss_target
        ),
        missed=tuple(name for record in records for name in record.missed or ()),
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
) -> list[RoundRecord]:
    """The records of all rounds, in order; each state is written as soon as it is there, and let go."""
    before = start
    depend = rounds_depend(settings)
    records: dict[int, RoundRecord] = {}

    def done(round_: Round, state: AdaptorState, *, kept: bool) -> None:
        nonlocal before
        records[round_.number] = state.rounds[0]
        listener.round_done(round_.number, round_.of, state.rounds[0], kept=kept)
        if depend:
            before = stack([before, state] if before else [state])

    for group in [[round_] for round_ in rounds] if depend else [rounds]:
        missing = []
        for round_ in group:
            state = _finished(base, _file_of(folder, round_), round_.edits, settings, before) if resume else None
            if state is None:
                missing.append(round_)
            else:
                done(round_, state, kept=True)
        for round_, state in engine.train(base, missing, settings, before, listener):
            _check_converged(round_, state)
            save_adaptor(state, _file_of(folder, round_), overwrite=force or resume)
            done(round_, state, kept=False)
    return [records[round_.number] for round_ in rounds]


def _check_converged(round_: Round, state: AdaptorState) -> None:
    loss = state.rounds[0].loss
    if not math.isfinite(loss):
        raise LemoeError(f"round {round_.number} diverged (loss {loss}); lower --learning-rate")


def _file_of(folder: Path, round_: Round) -> Path:
    """Where a round is written; names sort as the numbers do."""
    digits = max(DIGITS, len(str(round_.of)))
    return folder / ROUNDS_NAME / f"{round_.number:0{digits}d}.safetensors"


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
