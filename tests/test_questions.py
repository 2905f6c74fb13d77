"""What the words of a question say of it: its frame, and what kind of answer it asks for."""

import pytest

import lemoe
from lemoe.routing.anchor.anchors import get_lexicon
from lemoe.routing.anchor.questions import (
    Question,
    StoredQuestion,
    are_one_word_apart,
    ask_for_other_kinds,
    compare_questions,
    compare_stems,
)
from lemoe.routing.anchor.words import split_words


def read(base: lemoe.BaseModel, text: str) -> Question:
    return Question.from_words(split_words(text), get_lexicon(base))


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("Who was the father of", "Who was the mother of", True),
        ("is headquartered in", "is based in", True),
        ("Who is the mayor of", "Who was the mayor of", False),
        ("What is the university where went", "What's the university where went", False),
        ("What state is located", "What state has", False),
        ("was born in", "was born on", True),
        ("father of", "mother of", False),
    ],
)
def test_questions_are_one_word_apart_where_the_word_asks_for_something_else(
    base: lemoe.BaseModel, one: str, other: str, apart: bool
) -> None:
    first, second = read(base, one).frame, read(base, other).frame
    assert are_one_word_apart(first, second) == are_one_word_apart(second, first) == apart


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("Where was born", "When was born", True),
        ("In which city was born", "Tell me when was born", True),
        ("Who founded", "What year was founded", True),
        ("How many people work for", "Who works for", True),
        ("When does expire", "After how many days does expire", False),
        ("Where does work", "Who employs", False),
        ("Where was born", "The birthday of is", False),
        ("What is the number of people who live in", "How many people live in", False),
        ("Which manager gets involved when fails", "Who is called for", False),
        ("", "When was born", False),
    ],
)
def test_a_time_or_amount_is_no_answer_to_who_or_where(
    base: lemoe.BaseModel, one: str, other: str, clash: bool
) -> None:
    first, second = read(base, one).kind, read(base, other).kind
    assert ask_for_other_kinds(first, second) == ask_for_other_kinds(second, first) == clash


@pytest.mark.parametrize(
    ("asked", "text", "enough"),
    [
        ("In which city was born", "was", False),
        ("In which city was born", "was born", True),
        ("In which city was born", "he was", True),
        ("In which city was born", "was the", False),
        ("What is the occupation of", "works as a", True),
        ("Who founded", "has been", False),
        ("What is", "is", True),
        ("is", "is", True),
    ],
)
def test_auxiliaries_and_articles_ask_for_nothing_where_an_edit_asks_for_more(
    base: lemoe.BaseModel, asked: str, text: str, enough: bool
) -> None:
    stored = StoredQuestion(read(base, asked), frozenset(), 0.0)
    assert compare_questions(stored, read(base, text), get_lexicon(base)).enough_evidence == enough
    assert compare_stems(stored, read(base, text)).enough_evidence == enough
