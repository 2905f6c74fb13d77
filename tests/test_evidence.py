"""From evidence to a decision: nothing heard is no agreement, and what the sentence before says against an edit."""

import math
from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import lemoe
from lemoe.base.frozen import read_layer_inputs
from lemoe.base.tokens import encode_edits, encode_passage
from lemoe.routing.anchor.anchors import Anchors, build_gate, get_lexicon
from lemoe.routing.anchor.comparisons import MeaningComparisons, WordComparisons
from lemoe.routing.anchor.evidence import (
    CLASH,
    EARLIER_SHARE,
    MAX_EARLIER,
    Evidence,
    FittedDecision,
    choose_decision,
    question_features,
    subject_features,
)
from lemoe.routing.anchor.fitting import fitted_meaning
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.keys import embed_prompts
from lemoe.routing.anchor.meaning import FEATURES, QUESTION_FEATURES, SUBJECT_FEATURES
from lemoe.routing.anchor.relation_words import bound_nats
from lemoe.routing.anchor.subjects import Mention, Sentence, Subject
from lemoe.routing.anchor.words import WordReader

Values = NDArray[numpy.float64]
FOUND = (1.0, *[0.0] * (len(SUBJECT_FEATURES) - 1))
UNREAD = 9.0  # of an edit's question, so that it does not vouch for itself


def read_words(heard: list[float], contradiction: float = 0.0) -> WordComparisons:
    """Comparisons with one anchor for each of `heard`."""
    ones = numpy.ones(len(heard))
    flags = numpy.zeros(len(heard), numpy.bool_)
    nothing = 0 * ones
    with numpy.errstate(divide="ignore"):
        weight = -numpy.log1p(-numpy.array(heard))  # of what is heard so far
    return WordComparisons(contradiction * ones, nothing, nothing, UNREAD * ones, weight, ~flags, flags, flags)


def feature(name: str, words: WordComparisons) -> Values:
    meaning = MeaningComparisons.none(len(words.heard))
    values: Values = question_features(words, meaning)[QUESTION_FEATURES.index(name)]
    return values


def test_words_agree_as_far_as_anything_was_heard() -> None:
    assert feature("agreement", read_words([0.0, 0.25, 1.0])).tolist() == [0.0, 0.25, 1.0]
    assert feature("agreement", read_words([1.0], contradiction=2.0)) == pytest.approx(math.exp(-2))
    assert feature("contradiction", read_words([0.0, 1.0], contradiction=2.0)) == pytest.approx(math.log(3))


@pytest.fixture
def decision() -> FittedDecision:
    """Its score is 2 for all comparisons without further evidence."""
    weights = numpy.zeros(len(FEATURES))
    weights[FEATURES.index("bias")] = 2.0
    return FittedDecision(weights, 0.5, relations=100)


def scores(decision: FittedDecision, heard: list[float], earlier: list[float] | None) -> list[float]:
    before = None if earlier is None else numpy.array(earlier)
    read = Evidence(FOUND, read_words(heard), MeaningComparisons.none(len(heard)), before)
    score, rank, evidence = decision.judge(read)
    assert score.tolist() == rank.tolist() == evidence.tolist()
    values: list[float] = score.tolist()
    return values


def test_a_sentence_that_asks_nothing_answers_what_was_asked_before(decision: FittedDecision) -> None:
    assert scores(decision, [0.0, 0.0], None) == [2.0, 2.0]
    assert scores(decision, [0.0, 0.0], [-2.5, 5.0]) == [-0.5, 2.0]


def test_the_sentence_before_counts_the_less_the_more_is_asked_since_and_never_speaks_for_an_edit(
    decision: FittedDecision,
) -> None:
    by_heard = [scores(decision, [heard], [-2.0])[0] for heard in (0.0, 0.3, 0.6, 1.0)]
    assert by_heard == sorted(by_heard)
    assert by_heard[0] == pytest.approx(0.0)
    assert by_heard[-1] == pytest.approx(2.0 - EARLIER_SHARE * 2.0)
    assert scores(decision, [0.0], [-100.0]) == scores(decision, [0.0], [-MAX_EARLIER]) == [2.0 - MAX_EARLIER]


def test_nothing_speaks_for_a_question_that_asks_for_an_answer_of_another_kind(decision: FittedDecision) -> None:
    words = replace(read_words([0.5, 0.5]), clash=numpy.array([True, False]))
    score, _, _ = decision.judge(Evidence(FOUND, words, MeaningComparisons.none(2)))
    assert score.tolist() == [CLASH, 2.0]


def test_another_word_is_no_other_question_as_far_as_both_mark_the_same_relation() -> None:
    words = replace(read_words([1.0] * 3), substituted=numpy.array([True, True, False]))
    meaning = replace(MeaningComparisons.none(3), relation=numpy.array([-2.0, 3.0, -2.0]))
    found = question_features(words, meaning)[QUESTION_FEATURES.index("substituted")]
    assert found.tolist() == pytest.approx([1.0, math.exp(-3.0), 0.0])


@given(
    weights=st.lists(st.floats(-6, 6), min_size=len(FEATURES), max_size=len(FEATURES)),
    read=st.tuples(st.floats(-90, 90), st.floats(-1, 1), st.floats(0, 1), st.floats(0, 50), st.floats(0, 9)),
    substituted=st.booleans(),
    mention=st.builds(
        Mention, st.floats(0, 1), st.just(frozenset([0])), st.booleans(), st.integers(0, 3), st.booleans()
    ),
)
def test_what_no_question_could_open_is_not_compared_and_nothing_else_is_left_out(
    base: lemoe.BaseModel,
    weights: list[float],
    read: tuple[float, float, float, float, float],
    substituted: bool,
    mention: Mention,
) -> None:
    relations, (ratio, profile, agreement, conflict, weight) = 100, read
    least, most = bound_nats(relations)
    decision, subject = FittedDecision(numpy.array(weights), 0.5, relations), Subject("Marie Curie", get_lexicon(base))
    (conflicts, unread, weights_read), flag = numpy.array([[conflict], [0.0], [weight]]), numpy.array([substituted])
    words = WordComparisons(conflicts, unread, unread, unread, weights_read, ~flag | True, flag, flag & False)
    meaning = MeaningComparisons(*numpy.array([[ratio], [profile], [least + agreement * (most - least)]]))
    score, _, _ = decision.judge(Evidence(subject_features(subject, mention), words, meaning))
    assert decision.admits(subject, mention) or score[0] < 0


@pytest.mark.real
def test_a_name_that_shares_a_word_with_a_subject_is_not_compared(real_base: lemoe.BaseModel) -> None:
    meaning = fitted_meaning(real_base, len(real_base.layers) - 1)
    decision = choose_decision(meaning, 0.0, 0.5)
    subject = Subject("Barack Obama", get_lexicon(real_base))

    def is_compared(text: str) -> bool:
        reader = WordReader()
        reader.push(text.encode())
        mention = subject.find_mention(Sentence(reader.words, get_lexicon(real_base)))
        return mention is not None and decision.admits(subject, mention)

    assert is_compared("Where was Barack Obama born?")
    assert is_compared("where was obama born")
    assert not is_compared("Where was Michelle Obama born?")


@pytest.mark.real
@pytest.mark.parametrize(
    ("prompt", "text", "opens"),
    [
        ("Where was Gerald Kelly born?", "When was Gerald Kelly born?", False),
        ("Where was Gerald Kelly born?", "Which city was Gerald Kelly born in?", True),
        ("Who was the father of Gerald Kelly?", "Who was the mother of Gerald Kelly?", False),
        ("What is the university where Gerald Kelly went?", "What's the university where Gerald Kelly went?", True),
        ("Kemira is headquartered in", "Kemira is based in", True),
    ],
)
def test_what_is_nearly_the_same_question_and_what_is_another(
    real_base: lemoe.BaseModel, prompt: str, text: str, opens: bool
) -> None:
    meaning = fitted_meaning(real_base, len(real_base.layers) - 1)
    assert meaning is not None
    subject = "Kemira" if "Kemira" in prompt else "Gerald Kelly"
    (edit,) = encode_edits(real_base, [lemoe.Edit(prompt, "x", subject)])
    anchor = Anchor(edit.prompt, edit.target, subject)
    settings = lemoe.resolve_settings("anchor")
    gate = build_gate(real_base, [anchor], settings)
    keys = embed_prompts(real_base, meaning, gate, [anchor.prompt], [0], 2048)
    live = Anchors.from_anchors([anchor], meaning, [keys[0][None]]).to_live(real_base, settings)
    ids = real_base.tokenizer(text).input_ids
    (hidden,) = read_layer_inputs(real_base, int(meaning.layer), [ids], 2048)
    assert (live.final_state(ids, hidden).edit >= 0) == opens


@pytest.mark.real
def test_a_gate_that_opened_on_a_name_shuts_where_it_goes_on_as_another(real_base: lemoe.BaseModel) -> None:
    edit = lemoe.Edit("The headquarters of Nokia is located in", "Turin", "Nokia", id="seat")
    meaning = fitted_meaning(real_base, len(real_base.layers) - 1)
    assert meaning is not None
    (passage,) = encode_edits(real_base, [edit])
    anchor, settings = Anchor(passage.prompt, passage.target, edit.subject), lemoe.resolve_settings("anchor")
    keys = embed_prompts(real_base, meaning, build_gate(real_base, [anchor], settings), [anchor.prompt], [0], 4096)
    live = Anchors.from_anchors([anchor], meaning, [keys[0][None]]).to_live(real_base, settings)

    def read(text: str) -> list[int]:
        """The edit that acts after each token."""
        ids = encode_passage(real_base, text).prompt
        (states,) = read_layer_inputs(real_base, int(meaning.layer), [ids], 4096)
        return [live.final_state(ids[:end], states[:end]).edit for end in range(1, len(ids) + 1)]

    assert read("In which city is Nokia based?")[-1] == 0
    goes_on = read("In which city is Nokia Arena based?")
    assert 0 in goes_on
    assert goes_on[-1] == -1
