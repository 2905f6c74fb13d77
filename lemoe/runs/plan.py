"""Which rounds a run trains and which edits it leaves out: by a new plan, a plan file, or an interrupted run's plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lemoe.adaptor.state import AdaptorState
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit, Round, combine_digests, join_labels
from lemoe.data.files import write_atomically
from lemoe.errors import InputError
from lemoe.planning.plan import edits_by_round, plan, save_plan
from lemoe.planning.plan_file import PlanFile, read_plan
from lemoe.runs.folder import PLAN_NAME, RunStart, check_resumed_start, read_start, write_start
from lemoe.runs.progress import ProgressCallback
from lemoe.settings import Settings


@dataclass(frozen=True)
class InterruptedRun:
    """What an interrupted run left besides its rounds: what it was started for, and its plan."""

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


def read_interrupted_run(folder: Path, start: AdaptorState | None) -> InterruptedRun:
    """What `folder` holds of a run to resume.

    Raises:
        InputError: if it continues another adaptor than `start`.
    """
    run, plan_file = read_start(folder), folder / PLAN_NAME
    check_resumed_start(folder, run, _adaptor_hash(start))
    return InterruptedRun(run, plan_file if plan_file.exists() else None)


def _adaptor_hash(start: AdaptorState | None) -> str | None:
    """Hash of the rounds that an adaptor holds."""
    return combine_digests(record.id + record.edits_sha256 for record in start.rounds) if start else None


def select_new_edits(edits: Sequence[Edit], start: AdaptorState | None, progress: ProgressCallback) -> list[Edit]:
    """The edits that the adaptor to continue does not answer yet.

    Raises:
        InputError: if there is none.
    """
    taught = start.answering_digests if start else frozenset()
    new = [edit for edit in edits if edit.digest not in taught]
    if not new:
        raise InputError(f"all {len(edits)} edits are already in the adaptor to continue; there is nothing to teach")
    if len(new) < len(edits):
        progress.note(f"{len(edits) - len(new)} edits are already in the adaptor and are left out")
    return new


def follow_plan(
    plan_file: Path | str | None,
    interrupted: InterruptedRun,
    round_range: range | None,
    edits: Sequence[Edit],
    new: Sequence[Edit],
    start: AdaptorState | None,
    progress: ProgressCallback,
) -> RunPlan:
    """The rounds with these indices in the plan file, or in the interrupted run's plan, without edits taught already.

    Raises:
        InputError: if the file is no plan of these edits, or lacks the rounds; or if the interrupted run's plan lacks
            edits.
    """
    path = Path(plan_file) if plan_file is not None else interrupted.plan
    assert path is not None
    planned = read_plan(path, edits)
    rounds = _select_rounds(path, planned, round_range, new)
    unplanned = planned.unnamed_edits(new)
    run = RunStart(round_range, {edit.id: edit.fact for edit in unplanned}, _adaptor_hash(start))
    if plan_file is None:
        _check_all_planned(path, interrupted, unplanned, len(edits))
        run = interrupted.run or run
    if unplanned:
        many = "1 edit is" if len(unplanned) == 1 else f"{len(unplanned)} edits are"
        progress.note(f"{many} left out: the plan does not name them: {join_labels(unplanned)}")
    repeated = sum(planned.is_repeated(edit) for edit in new)
    return RunPlan(rounds, run, path.read_bytes(), repeated, unplanned)


def _select_rounds(path: Path, planned: PlanFile, round_range: range | None, new: Sequence[Edit]) -> list[Round]:
    """The rounds with these indices in a plan, each with its new edits only."""
    count = len(planned.rounds)
    if round_range is None:
        round_range = range(count)
    if not 0 <= round_range.start < round_range.stop <= count:
        wanted_rounds = f"`round_range` {round_range.start}-{round_range.stop - 1}"
        raise InputError(f"{path}: {wanted_rounds} is not in it: it has rounds 0 to {count - 1}")
    wanted = {edit.id for edit in new}
    rounds = [Round(n + 1, count, [edit for edit in planned.rounds[n] if edit.id in wanted]) for n in round_range]
    rounds = [round_ for round_ in rounds if round_.edits]
    if not rounds:
        raise InputError(f"{path}: these rounds are already in the adaptor; there is nothing to teach")
    return rounds


def _check_all_planned(path: Path, interrupted: InterruptedRun, unplanned: Sequence[Edit], count: int) -> None:
    """Refuse to resume a run without edits that were added after it was planned."""
    left_out = interrupted.run.left_out if interrupted.run else {}
    if added := [edit for edit in unplanned if left_out.get(edit.id) != edit.fact]:
        raise InputError(
            f"{len(added)} of the {count} edits are not in the plan of the run to resume: {join_labels(added)}\n"
            f"  to finish the run without them, add `plan_file` {path}, and teach them afterwards with "
            f"`start` {path.parent} and another `folder`\n"
            "  to plan and train all edits anew, give `force` in place of `resume`"
        )


def write_run_files(folder: Path, chosen: RunPlan, *, overwrite: bool) -> None:
    """Write `run.yaml`, then `plan.yaml`, so that neither is ever combined with the other one of an earlier run."""
    path = folder / PLAN_NAME
    same = path.exists() and path.read_bytes() == chosen.plan
    if overwrite and not same:
        path.unlink(missing_ok=True)
    write_start(folder, chosen.run, overwrite=overwrite)
    if not same:
        write_atomically(path, chosen.plan, overwrite=overwrite)


def make_plan(
    base: BaseModel,
    edits: Sequence[Edit],
    settings: Settings,
    source: str,
    start: AdaptorState | None,
    progress: ProgressCallback,
) -> RunPlan:
    """The rounds of a new plan."""
    planned = plan(base, edits, settings)
    labels = {edit.id: edit.label for edit in edits}
    dropped = [conflict for conflict in planned.conflicts if conflict.relation != "contradiction"]
    for conflict in dropped:
        by = {"duplicate": "repeated", "superseded": "superseded"}[conflict.relation]
        progress.note(f"{labels[conflict.earlier]} is left out: {by} by {labels[conflict.later]}")
    members = edits_by_round(planned, edits)
    rounds = [Round(number, len(members), each) for number, each in enumerate(members, 1)]
    run = RunStart(None, {}, _adaptor_hash(start))
    return RunPlan(rounds, run, save_plan(planned, edits, source).encode(), len(dropped))
