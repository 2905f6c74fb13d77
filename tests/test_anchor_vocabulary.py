"""Words that are read imperfectly: every stored word that one may stand for is found, however many there are."""

from hypothesis import given
from hypothesis import strategies as st

from lemoe.routing.anchor.subjects import _credit
from lemoe.routing.anchor.vocabulary import Vocabulary
from lemoe.routing.anchor.words import Word

letters = st.text("abce", min_size=1, max_size=8)
stored_words = st.lists(letters, min_size=1, max_size=12, unique=True)


def found(stored: list[str], read: Word) -> set[str]:
    """The stored words of which a key is among the keys of what was read."""
    vocabulary = Vocabulary()
    keys = {word: vocabulary.add(word) for word in stored}
    return {word for word in stored if not set(keys[word]).isdisjoint(vocabulary.keys(read))}


@given(stored_words, letters, st.booleans())
def test_every_word_that_gets_credit_is_found(stored: list[str], text: str, capital: bool) -> None:
    credited = {word for word in stored if _credit(word, text, capital, False) and word != text}
    assert credited <= found(stored, Word(text, capital, False))


@given(stored_words, letters, st.booleans())
def test_and_of_words_of_three_letters_or_more_no_other(stored: list[str], text: str, capital: bool) -> None:
    credited = {word for word in stored if _credit(word, text, capital, False) or word == text}
    assert len(text) < 3 or found(stored, Word(text, capital, False)) <= credited


def test_a_misspelling_finds_its_word_among_many() -> None:
    many = [f"{first}{middle}{last}" for first in "abcde" for middle in ("lbert", "ndres", "mund") for last in "aeio"]
    assert found([*many, "fitzgerald"], Word("fitzgerlad", True, False)) == set()
    assert found([*many, "fitzgerald"], Word("fitzgeral", False, False)) == {"fitzgerald"}
    assert found([*many, "fitzgerald"], Word("fitgerald", True, False)) == {"fitzgerald"}


def test_a_word_that_joins_later_is_found_by_what_was_read_before() -> None:
    vocabulary = Vocabulary()
    vocabulary.add("gerald")
    read = Word("geraldine", True, False)
    assert vocabulary.keys(read) == {"gerald"}
    vocabulary.add("geraldina")
    assert vocabulary.keys(read) == {"gerald", "geraldina"}
