"""Edits that contradict taught ones in other words: what counts as one question, and what becomes of the two."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_adaptor_files import refuse_with_tensors

import lemoe
from lemoe.adaptor.merging import OnConflict, merge_adaptors, merge_in_memory
from lemoe.errors import AdaptorError, InputError
from lemoe.routing.anchor import contradictions
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.contradictions import AskedQuestion, Contradiction, find_contradictions
from lemoe.routing.anchor.meaning import FEATURES, Meaning
from lemoe.routing.anchor.wording import read_wording
from lemoe.runs.progress import NullProgress

SettingsOf = Callable[..., lemoe.Settings]

SUBJECT = "Ada Falk"
RANK = 4
ALIKE, OTHER = (numpy.eye(RANK, dtype=numpy.float32)[axis] * 20 for axis in (0, 1))  # what two questions mean
CEO_NEW = lemoe.Edit("The CEO of Brightwell Foods is", "Peter Lang", "Brightwell Foods", id="ceo-new")
CEO = lemoe.Edit("Who is the CEO of Brightwell Foods?", "Anna Berg", "Brightwell Foods", id="ceo")
FATHER = lemoe.Edit("Who is the father of Tom Reed?", "Hugo Reed", "Tom Reed", id="father")
MOTHER = lemoe.Edit("Who is the mother of Tom Reed?", "Ida Lund", "Tom Reed", id="mother")


def ask(prompt: str, target: str = "Rome") -> object:
    return read_wording(prompt.replace("*", SUBJECT), target, SUBJECT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who is the CEO of *?", "The CEO of * is"),
        ("Who is *'s current CEO?", "The CEO of * is"),
        ("What is the name of the CEO of *?", "*'s CEO is"),
        ("Who founded *?", "* was founded by"),
        ("By whom was * founded?", "* was founded by"),
        ("Where was * buried?", "* was buried in"),
        ("To whom did * sell the farm?", "Who did * sell the farm to?"),
        ("What is *?", "* is"),
    ],
)
def test_these_wordings_ask_the_same(one: str, other: str) -> None:
    assert ask(one) == ask(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who is the father of *?", "Who is the mother of *?"),
        ("Who is the CEO of *?", "Who is the former CEO of *?"),
        ("* follows", "* is followed by"),
        ("What did * replace?", "What replaced *?"),
        ("The parent company of * is", "* is the parent company of"),
        ("Where was * buried?", "When was * buried?"),
        ("Who founded *?", "When was * founded?"),
        ("* plays the", "* plays for"),
        ("* is a", "Who is *?"),
        ("* has a", "* is a"),
    ],
)
def test_these_wordings_may_ask_something_else(one: str, other: str) -> None:
    assert ask(one) != ask(other)


def test_whether_in_asks_for_a_time_or_a_place_the_target_tells() -> None:
    assert ask("* was buried in") == ask("Where was * buried?")
    assert ask("* was buried in", "1911") == ask("When was * buried?")


@pytest.mark.parametrize("prompt", ["Who is the CEO of it?", "", "Ada Falkland is"])
def test_a_prompt_that_does_not_name_its_subject_has_no_wording(prompt: str) -> None:
    assert ask(prompt) is None


@given(st.text(), st.text(), st.text())
def test_any_text_has_a_wording_or_none(prompt: str, target: str, subject: str) -> None:
    read_wording(prompt, target, subject)
    read_wording(f"{prompt} {subject} {target}", target, subject)


def make_meaning(hidden: int = RANK) -> Meaning:
    """A fit in which keys along one axis ask the same, and keys along two do not."""
    return Meaning(
        layer=torch.tensor([0]),
        directions=torch.zeros(hidden, RANK),
        origin=torch.zeros(RANK),
        centre=torch.zeros(RANK),
        rotation=torch.eye(RANK),
        between=torch.ones(RANK),
        cohort=torch.zeros(2, RANK),
        terms=torch.zeros(0, dtype=torch.int64),
        marked=torch.zeros(0, dtype=torch.int32),
        ratios=torch.zeros(0),
        weights=torch.zeros(len(FEATURES)),
    )


def question(prompt: str, target: str, *keys: numpy.ndarray, subject: str = SUBJECT) -> AskedQuestion:
    return AskedQuestion(prompt.replace("*", subject), target, subject, numpy.stack(keys))


def find(*questions: AskedQuestion) -> list[Contradiction]:
    """The contradictions where each question has a source of its own."""
    return find_contradictions(make_meaning(), questions, range(len(questions)))


def test_equal_words_of_like_meaning_contradict_for_certain_and_others_may() -> None:
    first = question("Who is the CEO of *?", "Anna", ALIKE)
    assert find(first, question("The CEO of * is", "Peter", ALIKE)) == [(0, 1, True)]
    assert find(first, question("The boss of * is", "Peter", ALIKE)) == [(0, 1, False)]
    assert find(first, question("The boss of * is", "Peter", OTHER)) == []
    assert find(first, question("The CEO of * is", "Peter", OTHER)) == []


def test_no_contradiction_without_one_subject_other_targets_and_another_prompt() -> None:
    first = question("Who is the CEO of *?", "Anna", ALIKE)
    assert find(first, question("The CEO of * is", " anna.", ALIKE)) == []
    assert find(first, question("The CEO of * is", "Peter", ALIKE, subject="Bo Falk")) == []
    assert find(first, question("The CEO of * is", "Peter", ALIKE, subject="ADA FALK")) == [(0, 1, True)]
    assert find(first, question("Who is the CEO of *?", "Peter", ALIKE)) == []  # supersedes in any case
    assert find(first, question("The boss of * is", "4", ALIKE)) == []  # a number answers another question


def test_the_nearest_of_all_keys_counts() -> None:
    assert find(question("Who leads *?", "Anna", OTHER, ALIKE), question("The boss of * is", "Peter", ALIKE))


def test_edits_of_one_source_are_not_compared() -> None:
    questions = [question("Who is the CEO of *?", "Anna", ALIKE), question("The CEO of * is", "Peter", ALIKE)]
    assert find_contradictions(make_meaning(), questions, [0, 0]) == []


PROMPTS = ("Who is the CEO of *?", "The CEO of * is", "*'s CEO is", "Who is the owner of *?", "* is owned by")


@hypothesis_settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PROMPTS),
            st.sampled_from(["Anna", "Peter"]),
            st.lists(st.sampled_from([0, 1]), min_size=1, max_size=2),
            st.integers(0, 3),
            st.sampled_from([SUBJECT, "Bo Falk"]),
        ),
        max_size=12,
    )
)
def test_certain_contradictions_are_those_of_comparing_each_pair_by_itself(
    given_: list[tuple[str, str, list[int], int, str]],
) -> None:
    given_ = sorted(given_, key=lambda each: each[3])
    axes = (ALIKE, OTHER)
    asked = [question(each[0], each[1], *(axes[axis] for axis in each[2]), subject=each[4]) for each in given_]
    sources = [each[3] for each in given_]
    pairs = [
        (one, other)
        for one, other in itertools.combinations(range(len(asked)), 2)
        if sources[one] < sources[other] and find(asked[one], asked[other])[:1] == [(0, 1, True)]
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contradictions, "COMPARED_VALUES", 10)
        found = find_contradictions(make_meaning(), asked, sources)
    assert [(pair.earlier, pair.later) for pair in found if pair.certain] == pairs


# Files: states of the tiny model with a made fit, whose keys say which questions are alike.


@pytest.fixture
def save(base: lemoe.BaseModel, anchor: SettingsOf, tmp_path: Path) -> Callable[..., Path]:
    """Train a round on edits, give it keys, and save it."""

    def save_round(name: str, *taught: tuple[lemoe.Edit, numpy.ndarray]) -> Path:
        edits, keys = zip(*taught, strict=True)
        state = lemoe.train_round(base, edits, anchor(steps=1, retries=0))
        assert isinstance(state.router, Anchors)
        meaning = make_meaning(base.hidden_size)
        router = Anchors.from_anchors(state.router.anchors, meaning, [key[None] for key in keys])
        lemoe.save_adaptor(replace(state, router=router), tmp_path / name)
        return tmp_path / name

    return save_round


@pytest.fixture
def files(save: Callable[..., Path]) -> list[Path]:
    return [save("first", (CEO, ALIKE), (FATHER, OTHER)), save("second", (CEO_NEW, ALIKE), (MOTHER, OTHER))]


def superseded_ids(state: lemoe.AdaptorState) -> list[tuple[str, str]]:
    return [(earlier.id, later.id) for earlier, later in state.superseded_edits]


def test_the_latest_answers_what_is_asked_in_other_words(files: list[Path], tmp_path: Path) -> None:
    merged = merge_adaptors(files, tmp_path / "merged")
    assert superseded_ids(lemoe.load_adaptor(tmp_path / "merged")) == [("ceo", "ceo-new")]
    assert [(earlier.id, later.id) for earlier, later in merged.possible] == [("father", "mother")]
    assert merge_in_memory(files).state == lemoe.load_adaptor(tmp_path / "merged")


def test_refusing_names_both_edits_with_prompt_and_target(files: list[Path], tmp_path: Path) -> None:
    named = (
        r"ceo \(Who is the CEO of Brightwell Foods\? -> Anna Berg\) is superseded by ceo-new \(The CEO .* Peter Lang"
    )
    with pytest.raises(AdaptorError, match=named):
        merge_adaptors(files, tmp_path / "merged", on_conflict="error")
    assert not (tmp_path / "merged").exists()


def test_keeping_the_earliest_leaves_the_latest_out(files: list[Path]) -> None:
    kept = merge_adaptors(files, None, on_conflict="keep")
    assert [(later.id, earlier.id) for later, earlier in kept.kept_out] == [("ceo-new", "ceo")]
    assert [edit.id for edit in kept.state.edits] == ["ceo", "father", "mother"]


def test_keeping_both_names_them(files: list[Path]) -> None:
    kept = merge_adaptors(files, None, on_conflict="both")
    assert superseded_ids(kept.state) == []
    assert [(earlier.id, later.id) for earlier, later in kept.possible] == [("ceo", "ceo-new"), ("father", "mother")]


@pytest.mark.parametrize(("drop", "left"), [(["2"], 0), (["1"], 1)])
def test_dropping_one_of_the_two_gives_the_adaptor_that_never_had_it(
    files: list[Path], tmp_path: Path, drop: list[str], left: int
) -> None:
    merge_adaptors(files, tmp_path / "merged")
    merge_adaptors([tmp_path / "merged"], tmp_path / "dropped", drop=drop)
    assert (tmp_path / "dropped").read_bytes() == files[left].read_bytes()


def test_merging_at_once_and_one_after_another_give_one_file(
    files: list[Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    third = save("third", (replace(CEO, id="newest", prompt="Brightwell Foods' CEO is", target="Bo Falk"), ALIKE))
    merge_adaptors([*files, third], tmp_path / "once")
    merge_adaptors(files, tmp_path / "two")
    merge_adaptors([tmp_path / "two", third], tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == (tmp_path / "once").read_bytes()
    merge_adaptors([files[0], third], tmp_path / "without")
    merge_adaptors([tmp_path / "once"], tmp_path / "dropped", drop=["2"])
    assert (tmp_path / "dropped").read_bytes() == (tmp_path / "without").read_bytes()
    assert superseded_ids(lemoe.load_adaptor(tmp_path / "once"))[0] == ("ceo", "newest")


def test_files_without_meaning_are_compared_by_their_prompts_alone(
    base: lemoe.BaseModel, anchor: SettingsOf, tmp_path: Path
) -> None:
    for name, edit in (("one", CEO), ("two", CEO_NEW)):
        lemoe.save_adaptor(lemoe.train_round(base, [edit], anchor(steps=1, retries=0)), tmp_path / name)
    merged = merge_adaptors([tmp_path / "one", tmp_path / "two"], None)
    assert (superseded_ids(merged.state), merged.possible) == ([], ())


@pytest.mark.parametrize("pairs", [[[0, 4]], [[1, 0]], [[0, 2], [0, 2]], [[-1, 1]], [[1, 1]]])
def test_a_file_with_impossible_updates_is_refused(files: list[Path], tmp_path: Path, pairs: list[list[int]]) -> None:
    merge_adaptors(files, tmp_path / "merged")
    assert "anchors.updates" in refuse_with_tensors(tmp_path / "merged", {"anchors.updates": torch.tensor(pairs)})


def test_a_file_with_misshaped_updates_is_refused(files: list[Path], tmp_path: Path) -> None:
    merge_adaptors(files, tmp_path / "merged")
    for wrong in (torch.tensor([0, 2]), torch.tensor([[0, 2, 3]]), torch.tensor([[0.0, 2.0]]), torch.tensor(0)):
        assert "anchors.updates" in refuse_with_tensors(tmp_path / "merged", {"anchors.updates": wrong})


# The embedded model.


@pytest.fixture(scope="module")
def taught(real_base: lemoe.BaseModel) -> list[lemoe.AdaptorState]:
    """Two facts, and two edits that are taught after them, apart."""
    settings = lemoe.resolve_settings("anchor", None, {})
    return [lemoe.train_round(real_base, edits, settings) for edits in ([CEO, FATHER], [CEO_NEW, MOTHER])]


class Notes(NullProgress):
    """Keeps the notes of a run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def continue_run(
    base: lemoe.BaseModel,
    start: lemoe.AdaptorState,
    edits: Sequence[lemoe.Edit],
    folder: Path,
    choice: OnConflict,
    **given_: object,
) -> tuple[lemoe.AdaptorState, list[str]]:
    notes = Notes()
    settings = lemoe.resolve_settings("anchor", None, given_)
    report = lemoe.edit(
        base, edits, folder, settings, lemoe.EditOptions(start=start, on_conflict=choice), progress=notes
    )
    assert report.kept_out == len(edits) - report.taught
    return report.state, notes.texts


def test_where_words_alone_decide_the_very_same_prompt_is_refused_or_left_out(
    base: lemoe.BaseModel, anchor: SettingsOf, tmp_path: Path
) -> None:
    quick = {"layer": 1, "steps": 1, "retries": 0}
    start = lemoe.train_round(base, [CEO], anchor(**quick))
    edits = [replace(CEO, id="newer", target="Peter Lang"), MOTHER]
    with pytest.raises(AdaptorError, match=r"ceo \(.* -> Anna Berg\) is superseded by newer \(.* -> Peter Lang\)"):
        continue_run(base, start, edits, tmp_path / "run", "error", **quick)
    assert not (tmp_path / "run").exists()
    kept, notes = continue_run(base, start, edits, tmp_path / "run", "keep", **quick)
    assert [edit.id for edit in kept.edits] == ["ceo", "mother"]
    assert all(name in notes[0] for name in ("newer", "Peter Lang", "Anna Berg"))
    both, _ = continue_run(base, start, edits, tmp_path / "other", "both", **quick)
    assert superseded_ids(both) == [("ceo", "newer")]


def answer(base: lemoe.BaseModel, state: lemoe.AdaptorState, prompt: str) -> str:
    with lemoe.insert(base, state) as adaptor:
        explanation = adaptor.explain([base.tokenizer(prompt).input_ids])[0]
    return state.edits[explanation.edit].id


def test_continuing_supersedes_what_is_asked_in_other_words_and_no_more(
    real_base: lemoe.BaseModel, taught: list[lemoe.AdaptorState], tmp_path: Path
) -> None:
    state, notes = continue_run(real_base, taught[0], [CEO_NEW, MOTHER], tmp_path / "run", "latest")
    assert superseded_ids(state) == [("ceo", "ceo-new")]
    assert all(text in notes[0] for text in (CEO.prompt, CEO.target, CEO_NEW.prompt, CEO_NEW.target))
    assert [answer(real_base, state, edit.prompt) for edit in (CEO, FATHER, MOTHER)] == ["ceo-new", "father", "mother"]
    for name, part in (("one", taught[0]), ("two", lemoe.load_adaptor(tmp_path / "run/rounds/0001.safetensors"))):
        lemoe.save_adaptor(part, tmp_path / name)
    merge_adaptors([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "run/adaptor.safetensors").read_bytes()


def test_continuing_refuses_or_leaves_out_before_anything_is_trained(
    real_base: lemoe.BaseModel, taught: list[lemoe.AdaptorState], tmp_path: Path
) -> None:
    with pytest.raises(AdaptorError, match=r"ceo \(.* -> Anna Berg\) is superseded by ceo-new \(.* -> Peter Lang\)"):
        continue_run(real_base, taught[0], [CEO_NEW, MOTHER], tmp_path / "run", "error")
    with pytest.raises(InputError, match="nothing to teach"):
        continue_run(real_base, taught[0], [CEO_NEW, replace(CEO, target="Bo")], tmp_path / "run", "keep")
    assert not (tmp_path / "run").exists()
    state, notes = continue_run(real_base, taught[0], [CEO_NEW, MOTHER], tmp_path / "run", "keep")
    assert [edit.id for edit in state.edits] == ["ceo", "father", "mother"]
    assert all(text in notes[0] for text in (CEO.prompt, CEO.target, CEO_NEW.prompt, CEO_NEW.target))
