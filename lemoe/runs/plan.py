"""Which rounds a run trains and which edits it leaves out: by a new plan, a plan file, or the plan it began with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit, Round, digest_over, labels_of
from lemoe.data.files import write_whole
from lemoe.errors import InputError
from lemoe.planning.plan import plan, rounds_of, save_plan
from lemoe.planning.plan_file import PlanFile, read_plan
from lemoe.runs.folder import PLAN_NAME, RunStart, check_resumed_start, read_start, write_start
from lemoe.runs.progress import Listener
from lemoe.settings import Settings


@dataclass(frozen=True)
class BegunRun:
    """What an interrupted run has left besides its rounds: what it was started for, and its plan."""

    run: RunStart | None
    plan: Path | None


@dataclass(frozen=True)
class RunPlan:
    """What a run has to do.

    Attributes:
        rounds: to be trained.
        run, plan: the contents of the files that say so.
        repeated: how many edits are in no round because a later one repeats or supersedes them.
        unplanned: the edits that the plan does not name.
    """

    rounds: Sequence[Round]
    run: RunStart
    plan: bytes
    repeated: int
    unplanned: Sequence[Edit] = ()


def begun_run(folder: Path, start: AdaptorState | None) -> BegunRun:
    """What is there to resume.

    Raises:
        InputError: if it continues another adaptor than `start`.
    """
    run, plan_file = read_start(folder), folder / PLAN_NAME
    check_resumed_start(folder, run, _hash_of(start))
    return BegunRun(run, plan_file if plan_file.exists() else None)


def _hash_of(start: AdaptorState | None) -> str | None:
    """Of what an adaptor holds."""
    return digest_over(record.id + record.edits_sha256 for record in start.rounds) if start else None


def new_edits(edits: Sequence[Edit], start: AdaptorState | None, listener: Listener) -> list[Edit]:
    """The edits that the adaptor to continue does not answer yet.

    Raises:
        InputError: if there is none.
    """
    known = start.answering if start else frozenset()
    new = [edit for edit in edits if edit.digest not in known]
    if not new:
        raise InputError(f"all {len(edits)} edits are already in the adaptor to continue; there is nothing to teach")
    if len(new) < len(edits):
        listener.note(f"{len(edits) - len(new)} edits are already in the adaptor and are left out")
    return new


def followed_plan(
    plan_file: Path | str | None,
    begun: BegunRun,
    places: range | None,
    edits: Sequence[Edit],
    new: Sequence[Edit],
    start: AdaptorState | None,
    listener: Listener,
) -> RunPlan:
    """The rounds at these places of the plan file, or of the begun plan, without the edits that are taught already.

    Raises:
        InputError: if the file is no plan of these edits, or lacks the places; or if the begun plan lacks edits.
    """
    path = Path(plan_file) if plan_file is not None else begun.plan
    assert path is not None
    planned = read_plan(path, edits)
    rounds = _rounds_at(path, planned, places, new)
    unplanned = planned.not_named(new)
    run = RunStart(places, {edit.id: edit.fact for edit in unplanned}, _hash_of(start))
    if plan_file is None:
        _check_all_planned(path, begun, unplanned, len(edits))
        run = begun.run or run
    if unplanned:
        many = "1 edit is" if len(unplanned) == 1 else f"{len(unplanned)} edits are"
        listener.note(f"{many} left out: the plan does not name them: {labels_of(unplanned)}")
    repeated = sum(planned.is_repeated(edit) for edit in new)
    return RunPlan(rounds, run, path.read_bytes(), repeated, unplanned)


def _rounds_at(path: Path, planned: PlanFile, places: range | None, new: Sequence[Edit]) -> list[Round]:
    """The rounds at these places of a plan, with what of the edits is new."""
    count = len(planned.rounds)
    if places is None:
        places = range(count)
    if not 0 <= places.start < places.stop <= count:
        wanted_rounds = f"--rounds {places.start}-{places.stop - 1}"
        raise InputError(f"{path}: {wanted_rounds} is not in it: it has rounds 0 to {count - 1}")
    wanted = {edit.id for edit in new}
    rounds = [Round(n + 1, count, [edit for edit in planned.rounds[n] if edit.id in wanted]) for n in places]
    rounds = [round_ for round_ in rounds if round_.edits]
    if not rounds:
        raise InputError(f"{path}: these rounds are already in the adaptor; there is nothing to teach")
    return rounds


def _check_all_planned(path: Path, begun: BegunRun, unplanned: Sequence[Edit], count: int) -> None:
    """Refuse to resume a run without edits that came after it was planned."""
    left_out = begun.run.left_out if begun.run else {}
    if came := [edit for edit in unplanned if left_out.get(edit.id) != edit.fact]:
        raise InputError(
            f"{len(came)} of the {count} edits are not in the plan of the run to resume: {labels_of(came)}\n"
            f"  to finish the run without them, add --plan {path}, and teach them afterwards with "
            f"--from {path.parent} and another folder (-o)\n"
            "  to plan and train all edits anew, give --force in place of --resume"
        )


def write_beginning(folder: Path, chosen: RunPlan, *, overwrite: bool) -> None:
    """Write what the run is started for, then its plan; neither is ever beside the other of an earlier run."""
    path = folder / PLAN_NAME
    same = path.exists() and path.read_bytes() == chosen.plan
    if overwrite and not same:
        path.unlink(missing_ok=True)
    write_start(folder, chosen.run, overwrite=overwrite)
    if not same:
        write_whole(path, chosen.plan, overwrite=overwrite)


def fresh_plan(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    source: str,
    start: AdaptorState | None,
    listener: Listener,
) -> RunPlan:
    """The rounds of a new plan."""
    planned = plan(base, edits, settings)
    labels = {edit.id: edit.label for edit in edits}
    dropped = [conflict for conflict in planned.conflicts if conflict.relation != "contradiction"]
    for conflict in dropped:
        by = {"duplicate": "repeated", "superseded": "superseded"}[conflict.relation]
        listener.note(f"{labels[conflict.earlier]} is left out: {by} by {labels[conflict.later]}")
    members = rounds_of(planned, edits)
    rounds = [Round(number, len(members), each) for number, each in enumerate(members, 1)]
    run = RunStart(None, {}, _hash_of(start))
    return RunPlan(rounds, run, save_plan(planned, edits, source).encode(), len(dropped))
