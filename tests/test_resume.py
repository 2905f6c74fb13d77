"""Resumed runs: they go on with the edits, settings and rounds that they were started for, or are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lemoe
from lemoe.errors import InputError, LemoeError, OutputError
from lemoe.runs.engines import local
from lemoe.runs.folder import RUN_NAME
from lemoe.runs.progress import NullProgress

SettingsOf = Callable[..., lemoe.Settings]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_unfinished(folder: Path, lost: str) -> None:
    """Leave `folder` as a run does that is killed before it has written the round `lost`."""
    (folder / "adaptor.safetensors").unlink()
    (folder / "rounds" / lost).unlink()


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_training(*args: object, **kwargs: object) -> lemoe.AdaptorState:
        raise AssertionError("a round was trained")

    monkeypatch.setattr(local, "train_round", fail_training)


class RecordedNotes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Six facts in four rounds."""
    path = tmp_path / "plan.yaml"
    path.write_text("rounds: [[fact-5], [fact-2, fact-0], [fact-1, fact-3], [fact-4]]")
    return path


# The edits.


def test_a_run_is_not_resumed_without_edits_that_came_after_it_was_planned(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    lemoe.edit(base, facts[:4], folder, anchor())
    make_unfinished(folder, "0002.safetensors")
    before = read_files(folder)
    forbid_training(monkeypatch)
    with pytest.raises(InputError) as refused:
        lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(resume=True))
    message = str(refused.value)
    assert "2 of the 6 edits are not in the plan of the run to resume" in message
    for edit in facts[4:]:
        assert f"{edit.id} ({edit.prompt} -> {edit.target})" in message
    assert all(option in message for option in (f"`plan_file` {folder / 'plan.yaml'}", f"`start` {folder}", "`force`"))
    assert read_files(folder) == before


def test_what_the_message_advises_teaches_every_edit(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    whole = lemoe.edit(base, facts[:4], folder, anchor()).path.read_bytes()
    make_unfinished(folder, "0002.safetensors")
    progress = RecordedNotes()
    report = lemoe.edit(
        base, facts, folder, anchor(), lemoe.EditOptions(resume=True, plan_file=folder / "plan.yaml"), progress=progress
    )
    assert report.path.read_bytes() == whole
    assert (report.taught, report.unplanned) == (4, ("fact-4", "fact-5"))
    assert [note for note in progress.notes if "2 edits are left out: the plan does not name them" in note]
    rest = lemoe.edit(base, facts, tmp_path / "rest", anchor(), lemoe.EditOptions(start=report.state))
    assert (rest.taught, rest.already_taught, rest.unplanned) == (2, 4, ())
    assert {edit.digest for edit in facts} == set(rest.state.answering_digests)


def test_a_plan_that_names_fewer_edits_is_followed_and_the_others_are_counted(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text("rounds: [[fact-5], [fact-2]]")
    progress = RecordedNotes()
    report = lemoe.edit(
        base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(plan_file=tmp_path / "plan.yaml"), progress=progress
    )
    assert (report.taught, report.unplanned) == (2, ("fact-0", "fact-1", "fact-3", "fact-4"))
    (note,) = [note for note in progress.notes if "the plan does not name them" in note]
    assert note.startswith("4 edits are left out")
    assert f"fact-0 ({facts[0].prompt} -> {facts[0].target})" in note


def test_a_run_of_a_shortened_plan_is_resumed_to_the_same_bytes(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text("rounds: [[fact-5], [fact-2]]")
    folder = tmp_path / "run"
    lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(plan_file=tmp_path / "plan.yaml"))
    whole = read_files(folder)
    make_unfinished(folder, "0002.safetensors")
    report = lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(resume=True))
    assert read_files(folder) == whole
    assert len(report.unplanned) == 4


def test_edits_that_a_later_one_repeats_are_counted_and_do_not_keep_a_run_from_being_resumed(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    edits = [*facts[:3], replace(facts[0], id="newer", target="Bergen"), replace(facts[1], id="again")]
    folder = tmp_path / "run"
    progress = RecordedNotes()
    report = lemoe.edit(base, edits, folder, anchor(), progress=progress)
    assert (report.taught, report.repeated, report.unplanned) == (3, 2, ())
    prompt = facts[0].prompt
    assert f"fact-0 ({prompt} -> Rome) is left out: superseded by newer ({prompt} -> Bergen)" in progress.notes
    whole = read_files(folder)
    make_unfinished(folder, "0002.safetensors")
    report = lemoe.edit(base, edits, folder, anchor(), lemoe.EditOptions(resume=True))
    assert (report.taught, report.repeated, report.unplanned) == (3, 2, ())
    assert read_files(folder) == whole


def test_a_run_is_not_resumed_without_the_adaptor_that_it_continued(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    start = lemoe.train_round(base, facts[:2], anchor())
    folder = tmp_path / "run"
    lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(start=start))
    before = read_files(folder)
    make_unfinished(folder, "0002.safetensors")
    with pytest.raises(InputError, match="continues an adaptor with `start`"):
        lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(resume=True))
    with pytest.raises(InputError, match="continues another adaptor"):
        lemoe.edit(
            base,
            facts,
            folder,
            anchor(),
            lemoe.EditOptions(resume=True, start=lemoe.train_round(base, facts[:1], anchor())),
        )
    lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(resume=True, start=start))
    assert read_files(folder) == before


# The settings, the base.


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layer": 2}, "layer: 1, now 2"),
        ({"steps": 3}, "steps: 12, now 3"),
        ({"seed": 5, "noise": 0.25}, "noise: 0.5, now 0.25"),
    ],
)
def test_other_settings_than_the_finished_rounds_are_refused_before_anything_is_trained(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, float],
    said: str,
) -> None:
    folder = tmp_path / "run"
    lemoe.edit(base, facts, folder, anchor())
    make_unfinished(folder, "0001.safetensors")
    before = read_files(folder)
    forbid_training(monkeypatch)
    with pytest.raises(OutputError) as refused:
        lemoe.edit(base, facts, folder, anchor(**other), lemoe.EditOptions(resume=True))
    assert said in str(refused.value)
    assert "0002.safetensors" in str(refused.value)
    assert read_files(folder) == before


def test_another_preset_than_the_finished_rounds_is_refused_by_its_name(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    paper: SettingsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lemoe.edit(base, facts, tmp_path / "run", anchor())
    make_unfinished(tmp_path / "run", "0001.safetensors")
    forbid_training(monkeypatch)
    with pytest.raises(OutputError, match="preset: anchor, now paper"):
        lemoe.edit(base, facts, tmp_path / "run", paper(), lemoe.EditOptions(resume=True))


def test_another_base_than_the_finished_rounds_is_refused_with_the_differences(
    tiny: Callable[[str], lemoe.BaseModel],
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lemoe.edit(base, facts, tmp_path / "run", anchor())
    make_unfinished(tmp_path / "run", "0001.safetensors")
    forbid_training(monkeypatch)
    with pytest.raises(OutputError, match="architecture: LlamaForCausalLM, now MistralForCausalLM"):
        lemoe.edit(tiny("mistral"), facts, tmp_path / "run", anchor(), lemoe.EditOptions(resume=True))


def test_edits_that_were_changed_since_their_round_was_trained_are_refused_by_name(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    lemoe.edit(base, facts, tmp_path / "run", anchor())
    changed = [replace(edit, target="elsewhere") if edit.id == "fact-3" else edit for edit in facts]
    with pytest.raises(LemoeError, match=r"edits: fact-3 \(Marie Curie was born in the town of -> elsewhere\)"):
        lemoe.edit(base, changed, tmp_path / "run", anchor(), lemoe.EditOptions(resume=True))


# The rounds.


def test_a_part_is_resumed_with_its_own_rounds_alone(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(plan_file=plan, round_range=range(1, 3)))
    whole = read_files(folder)
    assert RUN_NAME in whole
    for plan_file in (None, plan):
        make_unfinished(folder, "0003.safetensors")
        lemoe.edit(base, facts, folder, anchor(), lemoe.EditOptions(plan_file=plan_file, resume=True))
        assert read_files(folder) == whole


@pytest.mark.parametrize(("first", "then"), [(range(1, 3), range(4)), (range(1, 3), range(1, 2)), (None, range(1, 3))])
def test_a_folder_is_not_resumed_for_other_rounds_than_it_was_started_for(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: SettingsOf,
    plan: Path,
    tmp_path: Path,
    first: range | None,
    then: range,
) -> None:
    lemoe.edit(base, facts, tmp_path / "part", anchor(), lemoe.EditOptions(plan_file=plan, round_range=first))
    before = read_files(tmp_path / "part")
    started = "`round_range` 1-2" if first else "all rounds of its plan"
    with pytest.raises(
        InputError, match=f"was started for {started}, not for `round_range` {then.start}-{then.stop - 1}"
    ):
        lemoe.edit(
            base, facts, tmp_path / "part", anchor(), lemoe.EditOptions(plan_file=plan, round_range=then, resume=True)
        )
    assert read_files(tmp_path / "part") == before


def test_force_forgets_the_rounds_that_the_folder_was_started_for(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(plan_file=plan, round_range=range(1, 2)))
    lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(plan_file=plan, force=True))
    whole = read_files(tmp_path / "run")
    make_unfinished(tmp_path / "run", "0004.safetensors")
    lemoe.edit(base, facts, tmp_path / "run", anchor(), lemoe.EditOptions(resume=True))
    assert read_files(tmp_path / "run") == whole


@pytest.mark.parametrize("text", ["rounds: 3-1", "rounds: [1]", "- a", "rounds: {", "left_out: 7"])
def test_a_damaged_run_file_is_refused_by_its_name(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path, text: str
) -> None:
    lemoe.edit(base, facts[:2], tmp_path / "run", anchor())
    (tmp_path / "run" / RUN_NAME).write_text(text)
    with pytest.raises(InputError, match=RUN_NAME):
        lemoe.edit(base, facts[:2], tmp_path / "run", anchor(), lemoe.EditOptions(resume=True))
