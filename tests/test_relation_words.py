"""Which relation of the bank the words of a question mark."""

from collections.abc import Sequence

import numpy
import pytest
import torch

from lemoe.data.question_bank import REMARK, read_question_bank
from lemoe.routing.anchor.relation_words import RelationProfiles, RelationWords, bound_nats
from lemoe.routing.anchor.words import split_words

WORDINGS = (
    ("Who is the father of {}?", 0),
    ("The father of {} is", 0),
    ("dad of {}", 0),
    ("the dad of {}", 0),
    ("Who is the mother of {}?", 1),
    ("The mother of {} is", 1),
    ("mum of {}", 1),
    ("In which year was {} built?", 2),
    ("{} was built in the year", 2),
)


def count(wordings: Sequence[tuple[str, int]]) -> RelationWords:
    return RelationWords.from_wordings([text for text, _ in wordings], [relation for _, relation in wordings])


@pytest.fixture(scope="module")
def counted() -> RelationWords:
    return count(WORDINGS)


@pytest.fixture(scope="module")
def bank() -> RelationWords:
    wordings = [wording for wording in read_question_bank() if wording.relation != REMARK]
    numbers = {name: number for number, name in enumerate(sorted({wording.relation for wording in wordings}))}
    return count([(wording.template, numbers[wording.relation]) for wording in wordings])


def compare(words: RelationWords, one: str, other: str) -> float:
    return float(RelationProfiles(words.profile(split_words(one))[None]).compare(words.profile(split_words(other)))[0])


def test_the_words_of_a_relation_mark_it(counted: RelationWords) -> None:
    assert counted.count == 3
    profile = counted.profile(split_words("father of"))
    assert profile.argmax() in (0, 3)
    assert profile[0] > profile[1] > 0
    assert profile.sum() == pytest.approx(1)


def test_words_that_no_wording_has_mark_none(counted: RelationWords) -> None:
    unknown = counted.profile(["zither"])
    assert numpy.array_equal(unknown, counted.profile([]))
    assert unknown.argmax() == 3
    assert len(set(unknown[:3].tolist())) == 1


def test_a_word_of_every_relation_tells_nothing() -> None:
    everywhere = count([(f"the {name} of {{}}", number) for number, name in enumerate("abcd") for _ in range(2)])
    assert everywhere.profile(["the"]).tolist() == pytest.approx(everywhere.profile([]).tolist())


def test_a_term_of_one_wording_is_not_counted(counted: RelationWords) -> None:
    assert numpy.array_equal(counted.profile(["mum"]), counted.profile([]))


def test_entries_ascend_and_do_not_depend_on_the_order_of_wordings(counted: RelationWords) -> None:
    assert bool((counted.terms.diff() >= 0).all())
    assert counted.relations.dtype == torch.int32
    assert count(WORDINGS[::-1]) == counted


def test_no_wordings_mark_nothing() -> None:
    empty = count([])
    assert empty.count == 0
    assert empty.profile(["father"]).tolist() == [1.0]
    assert RelationProfiles(empty.profile([])[None]).compare(empty.profile([])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("is the mother tongue of", "native language of", True),
        ("Wo wurde geboren", "was born in the city of", True),
        ("occupation of is", "the name of the employer of is", False),
        ("Who is the CEO of", "When was founded", False),
        ("What is the capital of", "official language of is", False),
    ],
)
def test_the_bank_tells_relations_apart_and_knows_their_wordings(
    bank: RelationWords, one: str, other: str, alike: bool
) -> None:
    assert (compare(bank, one, other) > 0) == alike
    assert compare(bank, one, other) == pytest.approx(compare(bank, other, one))


def test_certain_profiles_of_two_relations_agree_least() -> None:
    one, other = numpy.array([[1.0, 0, 0]], numpy.float32), numpy.array([0, 1.0, 0], numpy.float32)
    least, most = bound_nats(2)
    assert RelationProfiles(one).compare(other)[0] == pytest.approx(least)
    assert RelationProfiles(one).compare(one[0])[0] == pytest.approx(most)


def test_relations_that_share_their_words_agree_more_than_any_two_and_less_than_one_with_itself(
    bank: RelationWords,
) -> None:
    born, birthday, taken = "where was born", "when was born", "is headquartered in"
    assert compare(bank, born, taken) < compare(bank, born, birthday) < compare(bank, born, born) - 1
    assert compare(bank, taken, "is based in") > 1
