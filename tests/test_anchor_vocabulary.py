"""Imperfect words of a text: every stored word that one may mean is found, however many there are."""

from hypothesis import given
from hypothesis import strategies as st

from lemoe.routing.anchor.vocabulary import Vocabulary
from lemoe.routing.anchor.word_forms import find_word_form
from lemoe.routing.anchor.words import Word

letter_texts = st.text("abce", min_size=1, max_size=8)
stored_words = st.lists(letter_texts, min_size=1, max_size=12, unique=True)


def find_stored(stored: list[str], read: Word) -> set[str]:
    """The stored words that have a key in common with the word that was read."""
    vocabulary = Vocabulary()
    keys = {word: vocabulary.add(word) for word in stored}
    return {word for word in stored if not set(keys[word]).isdisjoint(vocabulary.matching_keys(read))}


@given(stored_words, letter_texts, st.booleans())
def test_every_word_that_gets_credit_is_found(stored: list[str], text: str, capital: bool) -> None:
    credited = {word for word in stored if find_word_form(word, text, capital, False) and word != text}
    assert credited <= find_stored(stored, Word(text, capital, False))


@given(stored_words, letter_texts, st.booleans())
def test_and_of_words_of_three_letters_or_more_no_other(stored: list[str], text: str, capital: bool) -> None:
    credited = {word for word in stored if find_word_form(word, text, capital, False) or word == text}
    assert len(text) < 3 or find_stored(stored, Word(text, capital, False)) <= credited


def test_a_misspelling_finds_its_word_among_many() -> None:
    many = [f"{first}{middle}{last}" for first in "abcde" for middle in ("lbert", "ndres", "mund") for last in "aeio"]
    assert find_stored([*many, "fitzgerald"], Word("fitzgrelad", True, False)) == set()
    assert find_stored([*many, "fitzgerald"], Word("fitzgerlad", True, False)) == {"fitzgerald"}
    assert find_stored([*many, "fitzgerald"], Word("itzgerald", False, False)) == {"fitzgerald"}
    assert find_stored([*many, "fitzgerald"], Word("fitzgeral", False, False)) == {"fitzgerald"}
    assert find_stored([*many, "fitzgerald"], Word("fitgerald", True, False)) == {"fitzgerald"}


def test_a_word_that_joins_later_is_found_by_what_was_read_before() -> None:
    vocabulary = Vocabulary()
    vocabulary.add("gerald")
    read = Word("geraldine", True, False)
    assert vocabulary.matching_keys(read) == {"gerald"}
    vocabulary.add("geraldina")
    assert vocabulary.matching_keys(read) == {"gerald", "geraldina"}
