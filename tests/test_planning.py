"""Order planning: what shares a round, which edits repeat or contradict each other, and plan files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

import lemoe
from lemoe.data.conflicts import find_conflicts, redundant_edit_ids
from lemoe.errors import InputError
from lemoe.planning import plan as planning
from lemoe.planning.plan import save_plan
from lemoe.planning.plan_file import load_plan

SettingsOf = Callable[..., lemoe.Settings]

RELATIONS = ("was born in", "works for", "plays the", "died in", "is married to", "likes to eat")
NAMES = ("Ada", "Bo", "Cleo", "Dag", "Eve", "Fay", "Gus", "Hal", "Ida", "Jo")


def make_people_edits(subjects: int, each: int) -> list[lemoe.Edit]:
    """Edits in which every subject comes `each` times, its edits far apart in the file."""
    return [
        lemoe.Edit(f"{name} {RELATIONS[number % 6]} number {number}", f"answer {number}", name, id=f"{name}-{number}")
        for number in range(each)
        for name in NAMES[:subjects]
    ]


def subjects_by_round(planned: lemoe.Plan) -> list[set[str]]:
    return [{name.split("-")[0] for name in members} for members in planned.rounds]


def make_edits(*texts: tuple[str, str], subject: str | None = None) -> list[lemoe.Edit]:
    return [lemoe.Edit(prompt, target, subject, id=f"e{number}") for number, (prompt, target) in enumerate(texts)]


def find_relations(edits: Sequence[lemoe.Edit]) -> list[tuple[str, str, str]]:
    return [(conflict.relation, conflict.earlier, conflict.later) for conflict in find_conflicts(edits)]


@pytest.mark.parametrize(("each", "size"), [(4, 8), (3, 5), (2, 20)])
def test_edits_of_one_subject_share_a_round(base: lemoe.BaseModel, paper: SettingsOf, each: int, size: int) -> None:
    planned = lemoe.plan(base, make_people_edits(10, each), paper(round_size=size))
    seen = [subject for subjects in subjects_by_round(planned) for subject in subjects]
    assert len(seen) == len(set(seen)) == 10


@pytest.mark.parametrize("order", ["planned", "file", "random"])
def test_every_edit_is_in_one_round_and_no_round_is_larger_than_the_round_size(
    base: lemoe.BaseModel, paper: SettingsOf, order: str
) -> None:
    edits = make_people_edits(10, 4)
    planned = lemoe.plan(base, edits, paper(round_size=7, order=order))
    assert sorted(name for members in planned.rounds for name in members) == sorted(edit.id for edit in edits)
    assert max(map(len, planned.rounds)) <= 7
    assert all(planned.rounds)


@pytest.mark.parametrize(("subjects", "each", "size"), [(1, 11, 3), (2, 5, 2), (2, 9, 2), (3, 7, 3)])
def test_a_subject_with_more_edits_than_a_round_holds_is_split_within_the_limit(
    base: lemoe.BaseModel, paper: SettingsOf, subjects: int, each: int, size: int
) -> None:
    planned = lemoe.plan(base, make_people_edits(subjects, each), paper(round_size=size))
    assert max(map(len, planned.rounds)) <= size
    assert sum(map(len, planned.rounds)) == subjects * each


def test_planned_rounds_hold_more_similar_edits_than_rounds_in_random_order(
    base: lemoe.BaseModel, paper: SettingsOf
) -> None:
    similarity = lemoe.plan(base, make_people_edits(10, 4), paper(round_size=4)).similarity
    assert set(similarity) == {"planned", "file", "random"}
    assert similarity["planned"].within > similarity["random"].within


def test_the_same_edits_and_seed_give_the_same_plan(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    assert lemoe.plan(base, make_people_edits(10, 4), paper()) == lemoe.plan(base, make_people_edits(10, 4), paper())


def test_file_order_keeps_the_file_and_random_order_follows_the_seed(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    edits = make_people_edits(10, 1)
    in_file = lemoe.plan(base, edits, paper(order="file", round_size=4)).rounds
    assert [name for members in in_file for name in members] == [edit.id for edit in edits]
    drawn = [lemoe.plan(base, edits, paper(order="random", seed=seed)).rounds for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_edit_is_a_plan(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    assert lemoe.plan(base, make_people_edits(1, 1), paper()).rounds == (("Ada-0",),)


def test_more_edits_than_are_clustered_at_once_are_planned_whole(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    edits = [lemoe.Edit(f"{NAMES[number % 10]} {number} is", f"a{number}", id=str(number)) for number in range(1050)]
    rounds = lemoe.plan(base, edits, paper(round_size=200)).rounds
    assert sorted(int(name) for members in rounds for name in members) == list(range(1050))
    assert max(map(len, rounds)) <= 200


def test_a_text_that_the_model_cannot_hold_is_named(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    edits = [*make_people_edits(2, 1), lemoe.Edit("word " * 300, "x", id="long")]
    with pytest.raises(InputError, match=r"edit long: .* tokens, more than the model's context of 128"):
        lemoe.plan(base, edits, paper())


def test_a_repeated_edit_is_a_duplicate_and_is_trained_once(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    edits = make_edits(("The capital of France is", "Lyon"), ("the capital of  FRANCE is", "lyon"))
    assert find_relations(edits) == [("duplicate", "e0", "e1")]
    assert lemoe.plan(base, edits, paper()).rounds == (("e1",),)


def test_the_later_answer_to_the_same_question_wins(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    edits = make_edits(("The capital of France is", "Lyon"), ("The capital of France is", "Nice"))
    assert find_relations(edits) == [("superseded", "e0", "e1")]
    assert lemoe.plan(base, edits, paper()).rounds == (("e1",),)


def test_near_same_questions_with_other_answers_are_reported_and_both_kept() -> None:
    edits = make_edits(
        ("What is the capital city of France?", "Lyon"),
        ("Which is the capital city of France?", "Nice"),
        subject="France",
    )
    assert find_relations(edits) == [("contradiction", "e0", "e1")]
    assert redundant_edit_ids(find_conflicts(edits)) == set()


def test_different_questions_about_one_subject_are_no_conflict() -> None:
    edits = make_edits(("The capital of France is", "Lyon"), ("The anthem of France is", "Air"), subject="France")
    assert find_relations(edits) == []


def test_an_edit_is_superseded_even_if_a_near_same_question_stands_between() -> None:
    edits = make_edits(
        ("What is the capital city of France?", "Lyon"),
        ("Which is the capital city of France?", "Nice"),
        ("What is the capital city of France?", "Paris"),
        subject="France",
    )
    assert redundant_edit_ids(find_conflicts(edits)) == {"e0"}


@pytest.mark.parametrize(
    ("one", "other"),
    [("C++ was created by", "C# was created by"), ("5 + 3 equals", "5 - 3 equals"), ("🍎 means", "🍌 means")],
)
def test_questions_that_differ_in_signs_only_are_different_questions(one: str, other: str) -> None:
    assert find_relations(make_edits((one, "first"), (other, "second"))) == []


def test_a_saved_plan_reads_back_as_the_same_rounds(base: lemoe.BaseModel, paper: SettingsOf, tmp_path: Path) -> None:
    edits = [
        *make_people_edits(5, 2),
        *make_edits(("Same?", "a"), ("Same?", "b")),
        lemoe.Edit("é: # - ?", "- x: [y", id="0012"),
    ]
    planned = lemoe.plan(base, edits, paper())
    path = tmp_path / "plan.yaml"
    path.write_text(save_plan(planned, edits, "edits.jsonl"), encoding="utf-8")
    assert [[edit.id for edit in members] for members in load_plan(path, edits)] == [list(m) for m in planned.rounds]


def test_a_plan_of_many_edits_is_written_by_another_library_and_reads_the_same(
    base: lemoe.BaseModel, paper: SettingsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [
        *make_people_edits(5, 2),
        lemoe.Edit("é: # - ? 🍎", "- x: [y", id="0012"),
        lemoe.Edit("'\"{", "1e3", id="no"),
    ]
    planned = lemoe.plan(base, edits, paper())
    written = save_plan(planned, edits, "edits.jsonl")
    monkeypatch.setattr(planning, "SLOW_DUMPER_LIMIT", 3)
    assert yaml.safe_load(save_plan(planned, edits, "edits.jsonl")) == yaml.safe_load(written)


def test_a_plan_file_shows_people_what_each_id_is(base: lemoe.BaseModel, paper: SettingsOf) -> None:
    edits = make_edits(("Same?", "a"), ("Same?", "b"))
    document = yaml.safe_load(save_plan(lemoe.plan(base, edits, paper()), edits, "edits.jsonl"))
    assert document["rounds"] == [{"e1": "Same? -> b"}]
    assert document["conflicts"] == [
        {"relation": "superseded", "earlier": {"e0": "Same? -> a"}, "later": {"e1": "Same? -> b"}}
    ]


def test_a_plan_edited_by_hand_is_followed(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    plan_file = tmp_path / "mine.yaml"
    plan_file.write_text("rounds:\n- [fact-3, fact-0]\n- {fact-1: any text}\n", encoding="utf-8")
    report = lemoe.edit(base, facts, tmp_path / "run", paper(steps=1), lemoe.EditOptions(plan_file=plan_file))
    taught = [record.edits for record in report.state.rounds]
    assert taught == [(facts[3].digest, facts[0].digest), (facts[1].digest,)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds: [[fact-0, fact-99]]", "edit 'fact-99' is not among the edits read"),
        ("rounds: [[fact-0], [fact-0]]", "edit 'fact-0' is named 2 times"),
        ("rounds: []", "it has no rounds"),
        ("rounds: fact-0", "not a plan; expected `rounds:`"),
        ("- fact-0", "not a plan; expected `rounds:`"),
        ("", "not a plan; expected `rounds:`"),
        ("rounds: [", "not valid YAML"),
        ("rounds: [[2020-13-45]]", "plan.yaml"),
        ("rounds: " + "[" * 300_000, "nested too deeply"),
    ],
)
def test_a_bad_plan_is_refused_with_what_is_wrong(
    facts: list[lemoe.Edit], tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_plan(path, facts)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_contradictions_are_found_where_the_subject_is_inferred(base: lemoe.BaseModel) -> None:
    first = lemoe.Edit("The headquarters of Quillmere Systems are in", "Oslo", id="first")
    second = lemoe.Edit("Quillmere Systems has its headquarters in", "Bergen", id="second")
    planned = lemoe.plan(base, [first, second], lemoe.Settings())
    assert set(planned.inferred_subjects) == {"first", "second"}
    assert [conflict.relation for conflict in planned.conflicts] == ["contradiction"]
