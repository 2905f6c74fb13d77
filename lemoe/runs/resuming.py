"""Finished rounds of an interrupted run: kept if the same would be trained now, else refused with the reasons."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.state import AdaptorState
from lemoe.base.fingerprint import Fingerprint
from lemoe.base.loading import BaseModel
from lemoe.data.edits import Edit, join_labels
from lemoe.errors import AdaptorError, OutputError
from lemoe.settings import Settings

MACHINE_SETTINGS = ("batch_tokens",)  # settings that do not change what a round learns
SEPARATELY_COMPARED = ("method", "layer")  # settings that are compared before all others


def check_finished_rounds(
    base: BaseModel,
    finished: Sequence[tuple[Path, Sequence[Edit]]],
    settings: Settings,
    layer: int,
    start: AdaptorState | None,
) -> None:
    """Refuse, before anything is trained, to go on from rounds of another run.

    Args:
        finished: each round's file, which may not exist, and the edits that it would be trained on now.
        layer: the layer at which rounds would be trained now.
        start: the adaptor that the run continues.

    Raises:
        OutputError: for the first such round, listing what differs.
    """
    for path, members in finished:
        try:
            state = AdaptorFile(path).state if path.exists() else None
        except AdaptorError:
            continue  # damaged, so that it is trained again
        if state and (differences := _list_differences(base, state, members, settings, layer, start)):
            heading = f"{path} was trained on other edits or with other settings than are given now:"
            advice = "give the same to resume, another `folder`, or `force` to start anew"
            raise OutputError("\n  ".join([heading, *differences, advice]))


def _list_differences(
    base: BaseModel,
    state: AdaptorState,
    members: Sequence[Edit],
    settings: Settings,
    layer: int,
    start: AdaptorState | None,
) -> list[str]:
    """One line for each difference between a finished round and what would be trained now."""
    found = _describe_changes([("preset", state.settings.method, settings.method), ("layer", state.base.layer, layer)])
    if not found:
        compared = [
            field.name for field in fields(Settings) if field.name not in (*MACHINE_SETTINGS, *SEPARATELY_COMPARED)
        ]
        found = _describe_changes([(name, getattr(state.settings, name), getattr(settings, name)) for name in compared])
    if state.base.layer == layer:
        found += _base_differences(state, base.fingerprint(layer, settings.layer_path), start)
    trained_on = {digest for record in state.rounds for digest in record.edits}
    if changed := [edit for edit in members if edit.digest not in trained_on]:
        found.append(f"edits: {join_labels(changed)}: not among those it was trained on")
    return found


def _base_differences(state: AdaptorState, current: Fingerprint, start: AdaptorState | None) -> list[str]:
    """Differences between the base that a round was trained on and the current one.

    A round that continues an adaptor has that adaptor's fingerprint, and records how its own base differed from it.
    """
    given = start.base if start else current
    if names := state.base.differing_fields(given):
        return _describe_changes([(name, getattr(state.base, name), getattr(given, name)) for name in names])
    then, now = state.rounds[0].base_differences, tuple(given.describe_differences(current))
    return [] if then == now else [f"base: differed in {'; '.join(then) or 'nothing'}, now in {'; '.join(now)}"]


def _describe_changes(values: Sequence[tuple[str, object, object]]) -> list[str]:
    return [f"{name}: {then}, now {now}" for name, then, now in values if then != now]
