"""Words and sentences, read from token bytes as they come: the input of every route of preset `anchor`."""

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lemoe.routing.anchor.words import WordReader, fold_text, needs_exact_match, one_edit_apart, split_words, stem_word

SENTENCES = (
    "The café in São Paulo opened. Where is it?",
    "Dr. J. R. R. Tolkien, 1892–1973: who wrote “The Hobbit”?\nHe did.",
    "東京タワー は 高い。 Łódź! naïve 🎻 strings",
    "A price of 3.5 million... So what",
)
texts = st.one_of(st.text(max_size=40), st.sampled_from(SENTENCES))


def read_pieces(pieces: Iterable[bytes]) -> tuple[WordReader, int]:
    """The reader after `pieces`, and how many sentences began after the first."""
    reader = WordReader()
    return reader, sum(reader.push(piece) for piece in pieces)


def last_words(text: str) -> list[str]:
    """The words of the last sentence of `text`."""
    return [word.text for word in read_pieces([text.encode()])[0].words]


def reader_state(reader: WordReader) -> tuple[list[tuple[str, bool, bool]], bool]:
    return [(word.text, word.capital, word.starts_sentence) for word in reader.words], reader.growing


@pytest.mark.parametrize(
    ("written", "folded"),
    [
        ("Čapek", "capek"),
        ("ŁÓDŹ", "lodz"),
        ("Straße", "strasse"),
        ("Æsir", "aesir"),
        ("Kierkegaard, Søren", "kierkegaard, soren"),
        ("ﬁlm", "film"),
        ("I’m", "i'm"),
        ("İstanbul", "istanbul"),
        ("Ａｂｃ", "abc"),
        ("東京", "東京"),
    ],
)
def test_letters_are_compared_without_case_and_diacritics(written: str, folded: str) -> None:
    assert fold_text(written) == folded


@given(st.text())
@example("Ǽ")  # a ligature with an accent
def test_folding_twice_changes_nothing_more_for_latin_text(text: str) -> None:
    latin = "".join(char for char in text if unicodedata.category(char) in ("Lu", "Ll", "Zs", "Nd") and ord(char) < 592)
    assert fold_text(fold_text(latin)) == fold_text(latin)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("city", "cities"),
        ("study", "studied"),
        ("play", "playing"),
        ("play", "played"),
        ("stop", "stopped"),
        ("run", "running"),
        ("horse", "horses"),
        ("locate", "located"),
        ("river", "rivers"),
        ("call", "called"),
        ("make", "makes"),
    ],
)
def test_plural_past_and_ing_forms_share_a_stem(one: str, other: str) -> None:
    assert stem_word(one) == stem_word(other)


@pytest.mark.parametrize("word", ["is", "was", "bus", "class", "crisis", "1950s", "3d", "gas", "b2b", "the"])
def test_short_words_and_words_with_digits_keep_their_ending(word: str) -> None:
    assert stem_word(word) == word


@pytest.mark.parametrize(
    ("one", "other"), [("mother", "father"), ("author", "authority"), ("capital", "capitol"), ("wed", "week")]
)
def test_different_words_keep_different_stems(one: str, other: str) -> None:
    assert stem_word(one) != stem_word(other)


@pytest.mark.parametrize("word", ["1984", "95", "7th", "ii", "iii", "iv", "xiv", "mp3"])
def test_numbers_and_roman_numerals_must_be_exact(word: str) -> None:
    assert needs_exact_match(word)


@pytest.mark.parametrize("word", ["war", "i", "x", "civil", "mix", "vivid", "lil", "a"])
def test_other_words_may_be_misspelt(word: str) -> None:
    assert not needs_exact_match(word)


def edit_distance(first: str, second: str) -> int:
    """Edits from one word to another, a swap of two neighbouring letters being one."""
    rows = [list(range(len(second) + 1))]
    for index, char in enumerate(first, 1):
        row = [index]
        for column, other in enumerate(second, 1):
            cost = min(rows[-1][column] + 1, row[-1] + 1, rows[-1][column - 1] + (char != other))
            if index > 1 and column > 1 and first[index - 2 : index] == second[column - 2 : column][::-1]:
                cost = min(cost, rows[-2][column - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


near_words = st.text("ab", max_size=5)


@given(near_words, near_words)
def test_one_edit_apart_agrees_with_the_edit_distance(one: str, other: str) -> None:
    assert one_edit_apart(one, other) == (edit_distance(one, other) <= 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello there. Where is Rome?", ["where", "is", "rome"]),
        ("Really? yes, it is", ["yes", "it", "is"]),
        ("One line\nanother line", ["another", "line"]),
        ("He left. “Then he came”", ["then", "he", "came"]),
        ("(So they say.) Now", ["now"]),
        ("In 1990. 1991 was", ["1991", "was"]),
        ("東京。 大阪", ["大", "阪"]),
    ],
)
def test_a_stop_before_a_capital_and_a_newline_start_a_sentence(text: str, words: list[str]) -> None:
    assert last_words(text) == words


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met J. R. R. Tolkien",
        "the U.S. Army",
        "from St. Louis",
        "costs 3.5 Euro",
        "see example.Org now",
        "an example. not new",
        "the end?Not yet",
        "Louis XIV, King",
    ],
)
def test_abbreviations_initials_and_stops_inside_words_do_not_start_one(text: str) -> None:
    assert last_words(text) == split_words(text)


def test_a_new_sentence_is_announced_when_its_first_word_starts() -> None:
    reader = WordReader()
    assert [reader.push(piece) for piece in (b"Yes", b".", b" ", b"N", b"o")] == [False, False, False, True, False]
    assert reader_state(reader) == ([("no", True, True)], True)


def test_capitals_and_sentence_starts_are_noted() -> None:
    reader, _ = read_pieces([b"What did iPhone 4S and Marie do"])
    assert [word.text for word in reader.words if word.capital] == ["what", "iphone", "4s", "marie"]
    assert [word.starts_sentence for word in reader.words] == [True, *[False] * 6]


def test_what_stands_behind_a_colon_starts_like_a_sentence() -> None:
    reader, _ = read_pieces([b"User: Where does Ada Lovelace live?"])
    assert [word.text for word in reader.words if word.starts_sentence] == ["user", "where"]
    reader, _ = read_pieces(["用户：Where does she live".encode()])
    assert [word.text for word in reader.words if word.starts_sentence] == ["用", "where"]
    reader, _ = read_pieces([b"User", b":", b" Wh"])
    assert reader.words[-1].starts_sentence
    assert reader.copy().words[-1].starts_sentence


def test_words_of_capitals_and_words_directly_beside_each_other_are_noted() -> None:
    reader, _ = read_pieces(["Was J. Doe (IBM) in São-Tomé, USA".encode()])
    assert [word.text for word in reader.words if word.upper] == ["j", "ibm", "usa"]
    assert [word.text for word in reader.words if not word.adjacent] == ["was", "ibm", "in", "usa"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("C++ or C#, not C", ["c++", "or", "c#", "not", "c"]),
        ("a+b and n5# é+", ["a+", "b", "and", "n5", "e+"]),
        ("Norwayの公用語", ["norway", "の", "公", "用", "語"]),
        ("東京2020年", ["東", "京", "2020", "年"]),
        ("マリー・キュリー", [*"マリーキュリー"]),
    ],
)
def test_signs_belong_to_a_word_and_characters_of_scripts_without_spaces_are_words(text: str, words: list[str]) -> None:
    assert split_words(text) == last_words(text) == words


@pytest.mark.parametrize(("text", "count"), [("서울은", 3), ("ประเทศไทย", 9), ("မြန်မာ", 5), ("ភាសា", 4)])
def test_each_letter_of_a_script_without_spaces_is_a_word(text: str, count: int) -> None:
    assert len(split_words(text)) == len(last_words(text)) == count


def test_a_word_grows_until_something_else_is_read() -> None:
    reader = WordReader()
    for piece, words, growing in ((b" Tol", ["tol"], True), (b"kien", ["tolkien"], True), (b"'", ["tolkien"], False)):
        reader.push(piece)
        assert ([word.text for word in reader.words], reader.growing) == (words, growing)


def test_accents_written_as_characters_of_their_own_belong_to_the_word() -> None:
    composed = "São Paulo, état, Ångström, tiếng Việt"
    assert last_words(unicodedata.normalize("NFD", composed)) == last_words(composed)
    assert last_words(composed)[:2] == ["sao", "paulo"]


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """The bytes of a text, and the same in pieces, cut anywhere."""
    content = draw(texts).encode("utf-8", "ignore")
    cuts = sorted(draw(st.lists(st.integers(0, len(content)), max_size=8)))
    bounds = [0, *cuts, len(content)]
    return content, [content[start:end] for start, end in pairwise(bounds)]


@given(split_texts())
@example(("naïve 🎻".encode(), [bytes([byte]) for byte in "naïve 🎻".encode()]))
def test_a_text_gives_the_same_words_however_its_bytes_are_cut(cut: tuple[bytes, list[bytes]]) -> None:
    content, pieces = cut
    whole, starts = read_pieces([content])
    parts, starts_of_parts = read_pieces(pieces)
    assert reader_state(parts) == reader_state(whole)
    assert bool(starts) == bool(starts_of_parts)


@given(split_texts(), st.integers(0, 8))
def test_a_copy_goes_on_independently(cut: tuple[bytes, list[bytes]], count: int) -> None:
    _, pieces = cut
    reader, _ = read_pieces(pieces[:count])
    before = reader_state(reader)
    other = reader.copy()
    other.push(b"grown. Another sentence")
    assert reader_state(reader) == before
    announced = [reader.push(piece) for piece in pieces[count:]]
    afresh = WordReader()
    assert announced == [afresh.push(piece) for piece in pieces][count:]
    assert reader_state(reader) == reader_state(afresh)


@given(split_texts(), st.binary(max_size=4))
def test_the_words_read_so_far_depend_on_no_later_byte(cut: tuple[bytes, list[bytes]], later: bytes) -> None:
    _, pieces = cut
    reader = WordReader()
    seen: list[Sequence[object]] = []
    for piece in pieces:
        reader.push(piece)
        seen.append(reader_state(reader))
    longer = WordReader()
    for piece, before in zip([*pieces, later], seen, strict=False):
        longer.push(piece)
        assert reader_state(longer) == before


@given(st.lists(st.text("abcdeéñøßÅK東カ서ก+#0123456789", min_size=1, max_size=6), max_size=6))
def test_a_running_text_gives_the_words_that_a_subject_is_stored_by(words: list[str]) -> None:
    text = " ".join(words)
    assert last_words(text) == split_words(text)


@pytest.mark.parametrize(
    "text",
    [
        "The Naked Gun 2½",
        "Pokémon™ Gold",
        "100 m² of Beyoncé’s house",
        "snake_case and e-mail",
    ],
)
def test_signs_that_fold_into_letters_read_as_they_are_stored(text: str) -> None:
    assert last_words(text) == split_words(text)


def test_bytes_that_are_no_text_do_not_damage_what_follows() -> None:
    whole, _ = read_pieces([b"a \xff\xfe ", "naïve Zoë".encode()])
    assert [word.text for word in whole.words][-2:] == ["naive", "zoe"]


def test_bytes_that_are_no_text_do_not_damage_what_follows_byte_by_byte() -> None:
    content = b"\xff" + " añandú Zoë".encode()
    reader, _ = read_pieces(bytes([byte]) for byte in content)
    assert [word.text for word in reader.words] == ["anandu", "zoe"]
