"""A run of `lemoe edit`: plan, train round by round, and write files that people can keep.

A run's folder holds `run.yaml` (what the run was started for), `plan.yaml`, one adaptor state per round under
`rounds/`, each written as soon as its round is trained, `adaptor.safetensors` (the stack of all rounds and of the
adaptor that the run continues), and its card, `README.md`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from lemoe.adaptor.checkpoint import AdaptorFile, load_adaptor, save_adaptor
from lemoe.adaptor.contradictions import contradiction_notes, possible_contradictions, split_sources
from lemoe.adaptor.header import ADAPTOR_NAME
from lemoe.adaptor.merging import OnConflict, write_stack
from lemoe.adaptor.state import AdaptorState, RoundRecord, check_base, check_settings, round_id, stack, superseded_note
from lemoe.base.loading import BaseLike, BaseModel, resolve_base
from lemoe.base.memory import fit_batch_tokens, free_memory
from lemoe.base.structure import FFNSite
from lemoe.base.tokens import encode_edits
from lemoe.data.edits import Edit, Edits, Round, resolve_edits
from lemoe.data.files import remove_scratch
from lemoe.errors import AdaptorError, InputError, LemoeError, OutputError
from lemoe.evaluation.evaluate import EvalOptions, evaluate
from lemoe.report.card import write_card
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.runs.conflicts import resolve_conflicts
from lemoe.runs.engines import Engine
from lemoe.runs.engines.local import LocalEngine
from lemoe.runs.folder import ROUNDS_NAME, check_folder, check_round_range, resumed_round_range
from lemoe.runs.layers import settle_layer
from lemoe.runs.plan import (
    InterruptedRun,
    RunPlan,
    follow_plan,
    make_plan,
    read_interrupted_run,
    select_new_edits,
    write_run_files,
)
from lemoe.runs.progress import NullProgress, ProgressCallback
from lemoe.runs.resuming import check_finished_rounds
from lemoe.settings import Settings
from lemoe.training.methods import check_adds_experts, method_of, parent_round

LOCK_NAME = ".lock"
ROUND_DIGITS = 4  # of a round's number in its file's name, unless the plan has more rounds
EXPERT_CACHE_BYTES = 256 << 20  # of experts kept in memory during the final reliability check


@dataclass(frozen=True)
class EditReport:
    """What a run did.

    Attributes:
        path, size: of the stacked adaptor's file, bytes.
        rounds: how many it holds.
        taught: the edits that are in the new rounds.
        already_taught: how many edits were left out because the adaptor to continue holds them already.
        kept_out: how many were left out because the adaptor to continue answers their question, and it was asked to
            keep its answers.
        repeated: how many were left out because a later one repeats or supersedes them.
        unplanned: names of those left out because the plan does not name them.
        reliability_before, reliability_after: share of their target tokens that the model predicts.
        exact_before, exact_after: share of them whose whole target it predicts.
        seconds: for training.
        unreached: numbers of the new rounds that ended above the loss target.
        missed: names of the edits whose own prompt was not answered when their round ended.

    Example:
        >>> import lemoe
        >>> report = lemoe.edit("llama", "edits.jsonl", "report.lemoe")
        >>> report.taught, report.repeated
        (3, 0)
        >>> report.path.name
        'adaptor.safetensors'
    """

    path: Path
    size: int
    rounds: int
    taught: int
    already_taught: int
    kept_out: int
    repeated: int
    unplanned: tuple[str, ...]
    reliability_before: float
    reliability_after: float
    exact_before: float
    exact_after: float
    seconds: float
    unreached: tuple[int, ...]
    missed: tuple[str, ...]

    def __repr__(self) -> str:
        reached = f"reliability={self.reliability_before:.3f} -> {self.reliability_after:.3f}"
        return f"EditReport(taught={self.taught}, {reached}, missed={len(self.missed)}, path={str(self.path)!r})"

    @cached_property
    def state(self) -> AdaptorState:
        """The stacked adaptor, read from its file on first use."""
        return load_adaptor(self.path)


@dataclass(frozen=True)
class EditOptions:
    """What a run follows, continues and may replace.

    Attributes:
        source: name of the edits file, for the plan.
        plan_file: rounds to follow; planned afresh if None. Edits that it does not name are left out and counted.
        round_range: train only the plan file's rounds with these indices, from 0; the adaptors of all rounds, stacked
            in the plan's order, are the adaptor of one run.
        start: an earlier adaptor to continue, or the path of its file or of its run's folder; its experts stay as they
            are, and edits it holds are left out.
        on_conflict: where edits ask what `start` answers already, by the same prompt or, for certain, in other words:
            let the `latest` answer, raise an `error`, or `keep` the answer and leave the new edits out. `both` lets
            `latest` answer the same prompt, and keeps what is asked in other words.
        force: write into a folder that holds an earlier run, replacing its files.
        resume: keep the rounds that an unfinished run of the same edits and settings left in `folder`, and go on with
            its plan and its rounds unless they are given; edits added since are refused unless `plan_file` is given.
        allow_base_mismatch: continue `start` on a base that it was not made for; the new rounds record how it differs.
        measure_layer: measure which layer to edit even where the model's preset says one; else it is measured where
            neither the settings nor the preset do.

    Example:
        >>> import lemoe
        >>> more = [{"prompt": "The Nile flows into the", "target": "Red Sea"}]
        >>> options = lemoe.EditOptions(start="edits.lemoe")
        >>> len(lemoe.edit("llama", more, "more.lemoe", options=options).state.edits)
        4
    """

    source: str = ""
    plan_file: Path | str | None = None
    round_range: range | None = None
    start: AdaptorState | Path | str | None = None
    on_conflict: OnConflict = "latest"
    force: bool = False
    resume: bool = False
    allow_base_mismatch: bool = False
    measure_layer: bool = False

    @property
    def overwrite(self) -> bool:
        """Whether files of an earlier run in the folder may be replaced."""
        return self.force or self.resume


def edit(
    base: BaseLike,
    edits: Edits,
    folder: Path | str,
    settings: Settings | None = None,
    options: EditOptions | None = None,
    *,
    engine: Engine | None = None,
    progress: ProgressCallback | None = None,
) -> EditReport:
    """Teach `edits` to an adaptor of `base` and write it under `folder`.

    Args:
        base: or what `load_base` takes.
        edits: or their records, or the path of their file.
        folder: for the adaptor, its rounds, its plan and its card.
        settings: those of preset `anchor` if None.
        options: what the run follows, continues and may replace; a new run in a new folder if None.
        engine: what trains the rounds; this process if None.
        progress: called as the run goes on.

    Raises:
        InputError: for edits or a plan that cannot be used, or rounds that cannot be trained by themselves; or if the
            run to resume was started for other edits, other rounds or another adaptor.
        AdaptorError: if `start` belongs to another base model; or if edits of it would be superseded and `on_conflict`
            is `error`.
        OutputError: if the folder holds an earlier run, is in use by another run or cannot be written; or if finished
            rounds of the run to resume were trained with other settings or another base.

    Example:
        >>> import lemoe
        >>> base = lemoe.load_base("llama")
        >>> report = lemoe.edit(base, "edits.jsonl", "out")
        >>> report.reliability_after > report.reliability_before
        True
        >>> lemoe.ask(base, "The Eiffel Tower is located in the city of", "out").edit
        'eiffel-tower-city'
    """
    settings, options = settings or Settings(), options or EditOptions()
    engine, progress = engine or LocalEngine(), progress or NullProgress()
    check_adds_experts(settings)
    check_engine(engine, settings)
    if isinstance(edits, Path | str):
        options = replace(options, source=options.source or Path(edits).name)
    edits, folder = resolve_edits(edits), Path(folder)
    start = load_adaptor(options.start) if isinstance(options.start, Path | str) else options.start
    base = resolve_base(base)
    if start:
        for difference in check_base(base, start, allow=options.allow_base_mismatch):
            progress.note(f"another base than the adaptor was made for: {difference}")
        check_settings(start, settings)
        settings = replace(settings, gate=start.settings.gate)
    layer = start.base.layer if start else settings.resolve_layer(len(base.layers), base.source.layers)
    _ = base.ffn_site(layer, settings.layer_path)  # refused at once if there is none
    with _lock_folder(folder):
        check_folder(folder, force=options.force, resume=options.resume)
        encode_edits(base, edits)
        interrupted = read_interrupted_run(folder, start) if options.resume else InterruptedRun(None, None)
        planned = options.plan_file is not None or interrupted.plan is not None
        round_range = resumed_round_range(folder, interrupted.run, options.round_range)
        check_round_range(round_range, settings, planned=planned)
        untaught = select_new_edits(edits, start, progress)
        new = resolve_conflicts(base, untaught, start, settings, options.on_conflict, progress) if start else untaught
        if planned:
            chosen = follow_plan(options.plan_file, interrupted, round_range, edits, new, start, progress)
        else:
            chosen = make_plan(base, new, settings, options.source, start, progress)
        rounds = chosen.rounds
        if start is None:
            _prepare_gate(base, layer, settings, progress)
            layer = settle_layer(base, settings, progress.note, measure=options.measure_layer).layer
            settings = replace(settings, layer=layer)
        if options.resume:
            finished = [(_round_path(folder, round_), round_.edits) for round_ in rounds]
            check_finished_rounds(base, finished, settings, layer, start)
        write_run_files(folder, chosen, overwrite=options.overwrite)
        progress.planned(len(rounds), sum(len(round_.edits) for round_ in rounds))
        settings = _shrink_batches(base, base.ffn_site(layer, settings.layer_path), settings, progress)
        began = time.monotonic()
        records = _train_rounds(base, rounds, settings, folder, start, engine, progress, options)
        seconds = time.monotonic() - began
        _write_adaptor(base, rounds, folder, start, options, progress)
        if options.force:
            _remove_leftovers(folder, rounds)
        left_out = len(edits) - len(untaught), len(untaught) - len(new)
        return _build_report(base, folder / ADAPTOR_NAME, chosen, left_out, records, settings, seconds, progress)


def _write_adaptor(
    base: BaseModel,
    rounds: Sequence[Round],
    folder: Path,
    start: AdaptorState | None,
    options: EditOptions,
    progress: ProgressCallback,
) -> None:
    """Stack what the run started from and the files of its rounds, with a card beside."""
    files = [AdaptorFile(_round_path(folder, round_)) for round_ in rounds]
    continued = len(start.rounds) if start else 0
    state = write_stack(
        [start, *files] if start else files,
        folder / ADAPTOR_NAME,
        continued=0 if options.on_conflict == "both" else continued,
        overwrite=options.overwrite,
    )
    for earlier, later in state.superseded_edits:
        progress.note(superseded_note(earlier, later))
    for note in contradiction_notes(possible_contradictions(state, split_sources(state, continued))):
        progress.note(note)
    write_card(folder, base, state)


def _build_report(
    base: BaseModel,
    path: Path,
    chosen: RunPlan,
    left_out: tuple[int, int],
    records: Sequence[RoundRecord],
    settings: Settings,
    seconds: float,
    progress: ProgressCallback,
) -> EditReport:
    """The final reliability check of the adaptor at `path`, and what the rounds with these `records` did.

    `left_out`: how many edits were left out as taught already, and as answered already.
    """
    taught = [edit for round_ in chosen.rounds for edit in round_.edits]
    adaptor = AdaptorFile(path)
    measured = evaluate(
        base,
        adaptor,
        taught,
        EvalOptions(
            only=("reliability",),
            batch_tokens=settings.batch_tokens,
            expert_cache=EXPERT_CACHE_BYTES,
            allow_base_mismatch=True,  # which `edit` has refused unless it was asked for
        ),
        on_progress=progress.edits_checked,
    )
    return EditReport(
        path=path,
        size=path.stat().st_size,
        rounds=len(adaptor.state.rounds),
        taught=len(taught),
        already_taught=left_out[0],
        kept_out=left_out[1],
        repeated=chosen.repeated,
        unplanned=tuple(edit.id for edit in chosen.unplanned),
        reliability_before=measured.value("reliability", stage="before"),
        reliability_after=measured.value("reliability"),
        exact_before=measured.value("reliability", "exact_match", stage="before"),
        exact_after=measured.value("reliability", "exact_match"),
        seconds=seconds,
        unreached=tuple(
            round_.number
            for round_, record in zip(chosen.rounds, records, strict=True)
            if not record.loss < settings.loss_target
        ),
        missed=tuple(name for record in records for name in record.missed or ()),
    )


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`; the lock of a run that dies is released."""
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(f"{folder}: another run is at work there; wait for it, or give another folder") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        for written_folder in (folder, folder / ROUNDS_NAME):
            remove_scratch(written_folder)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
        lock.release()


def _prepare_gate(base: BaseModel, layer: int, settings: Settings, progress: ProgressCallback) -> None:
    """Fit the gate to a model that it has not seen; the cache keeps the fit for all rounds and workers."""
    router = method_of(settings).router
    if router is not None and router.gated and settings.gate == "meaning" and base.decoder_reads_tokens:
        fitted_meaning(base, layer, progress.note)


def _shrink_batches(base: BaseModel, site: FFNSite, settings: Settings, progress: ProgressCallback) -> Settings:
    """The settings with batches that fit into the free memory."""
    tokens = fit_batch_tokens(base, site, settings.batch_tokens)
    if tokens < settings.batch_tokens:
        free = free_memory(base.devices) >> 20
        progress.note(f"{free:,} MiB of memory are free: batches of {tokens} tokens, not {settings.batch_tokens}")
    return replace(settings, batch_tokens=tokens)


def check_engine(engine: Engine, settings: Settings) -> None:
    """Refuse early to train dependent rounds in parallel.

    Raises:
        InputError: saying which engine trains them.
    """
    if method_of(settings).rounds_depend and not isinstance(engine, LocalEngine):
        raise InputError(f"preset {settings.method} trains each round beside those before it: leave `engine` out")


def _remove_leftovers(folder: Path, rounds: Sequence[Round]) -> None:
    """Round files of an earlier run in the same folder, which `force` replaced."""
    numbers = {round_.number for round_ in rounds}
    for path in (folder / ROUNDS_NAME).glob("[0-9]*.safetensors"):
        if path.stem.isdigit() and int(path.stem) not in numbers:
            path.unlink()


def _train_rounds(
    base: BaseModel,
    rounds: Sequence[Round],
    settings: Settings,
    folder: Path,
    start: AdaptorState | None,
    engine: Engine,
    progress: ProgressCallback,
    options: EditOptions,
) -> list[RoundRecord]:
    """The records of all rounds, in order; each state is written as soon as it is trained, and its tensors freed."""
    before = start
    depend = method_of(settings).rounds_depend
    records: dict[int, RoundRecord] = {}

    def finish_round(round_: Round, state: AdaptorState, *, kept: bool) -> None:
        nonlocal before
        records[round_.number] = state.rounds[0]
        progress.round_done(round_.number, round_.total, state.rounds[0], kept=kept)
        if depend:
            before = stack([before, state] if before else [state])

    for group in [[round_] for round_ in rounds] if depend else [rounds]:
        missing = []
        for round_ in group:
            state = (
                _load_finished_round(base, _round_path(folder, round_), round_.edits, settings, before)
                if options.resume
                else None
            )
            if state is None:
                missing.append(round_)
            else:
                finish_round(round_, state, kept=True)
        for round_, state in engine.train(base, missing, settings, before, progress):
            _check_converged(round_, state)
            save_adaptor(state, _round_path(folder, round_), overwrite=options.overwrite)
            finish_round(round_, state, kept=False)
    return [records[round_.number] for round_ in rounds]


def _check_converged(round_: Round, state: AdaptorState) -> None:
    loss = state.rounds[0].loss
    if not math.isfinite(loss):
        raise LemoeError(f"round {round_.number} diverged (loss {loss}); lower `learning_rate`")


def _round_path(folder: Path, round_: Round) -> Path:
    """The file of a round; names sort as the numbers do."""
    digits = max(ROUND_DIGITS, len(str(round_.total)))
    return folder / ROUNDS_NAME / f"{round_.number:0{digits}d}.safetensors"


def _load_finished_round(
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
    fingerprint = base.fingerprint(state.base.layer, settings.layer_path)
    expected = round_id(fingerprint, base.tokenizer.chat_template, resolved, members, parent_round(settings, before))
    if [record.id for record in state.rounds] != [expected]:
        raise OutputError(f"{path} was trained on other edits or with other settings; `force` starts anew")
    return state
