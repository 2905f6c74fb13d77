"""Subjects as people write them: which mentions of a name are found in a text, and how sure each is."""

from collections.abc import Callable, Sequence

import pytest

import lemoe
from lemoe.base.tokens import encode_passage
from lemoe.routing.anchor.anchors import build_gate, get_lexicon
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.route import Route
from lemoe.routing.anchor.subject_index import SubjectIndex
from lemoe.routing.anchor.subjects import Mention, Sentence, Subject
from lemoe.routing.anchor.words import Word, WordReader

Find = Callable[[str, str], Mention | None]

real = pytest.mark.real


@pytest.fixture(scope="module")
def find(real_base: lemoe.BaseModel) -> Find:
    """The strongest mention of a subject in a text's last sentence, read token by token as a route reads it."""

    def find_mention(subject: str, text: str) -> Mention | None:
        passage = encode_passage(real_base, f"What of {subject} is", "this")
        anchors = [Anchor(passage.prompt, passage.target, name) for name in (subject, "Ann Veronica", "鳥取県")]
        route = Route(build_gate(real_base, anchors, lemoe.resolve_settings("anchor")))
        for token in real_base.tokenizer(text).input_ids:
            route.push(token)
        return route._mentions.get(0)

    return find_mention


def words_at(text: str, positions: Sequence[int] | frozenset[int]) -> str:
    reader = WordReader()
    reader.push(text.encode())
    return " ".join(reader.words[position].text for position in sorted(positions))


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Apple", "where is apple based"),
        ("France", "which language is spoken in france?"),
        ("The Hobbit", "when was the hobbit published"),
        ("Marie Curie", "where was marie curie born"),
        ("iPhone", "who makes the iphone"),
        ("eBay", "who founded ebay?"),
        ("McDonald's", "who founded mcdonalds"),
        ("YouTube", "who owns you tube now"),
        ("US", "who leads us"),
        ("IT", "It is a field of"),
        ("C#", "who invented c# then"),
        ("The Hobbit", "The hobbit was written by"),
    ],
)
def test_a_name_in_lower_case_is_found_and_said_to_be(find: Find, subject: str, text: str) -> None:
    mention = find(subject, text)
    assert mention
    assert (mention.lowered, mention.misspelt, mention.neighbour) == (True, 0, False)
    assert mention.coverage > 0.75


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Apple", "What is Apple's revenue?"),
        ("Apple", "What is Apple’s revenue?"),
        ("Apple", "Apple is based in"),
        ("Apple", "What is Apples revenue?"),
        ("Siemens", "What is Siemens' revenue?"),
        ("The Beatles", "Who was The Beatles' drummer?"),
        ("UK", "What is the capital of the UK?"),
        ("US", "Who leads the US"),
        ("AI", "Who invented AI?"),
        ("X", "Who owns X?"),
        ("C++", "Who invented C++?"),
        ("C#", "Is C# older than Java?"),
        (".NET", "Who develops .NET?"),
        ("R", "Who wrote R?"),
        ("iPhone", "What does an Iphone cost?"),
        ("iPhone", "What does an IPHONE cost?"),
        ("iPhone", "What does an iPhone cost?"),
        ("YouTube", "Who owns Youtube?"),
        ("YouTube", "Who owns You Tube?"),
        ("McDonald's", "Who founded McDonalds?"),
        ("The Hobbit", "When was Hobbit published?"),
        ("Nestlé", "Who founded Nestle?"),
        ("Sao Paulo", "Who founded São Paulo?"),
        ("München", "Where is Muenchen?"),
        ("Berlin", "Wer ist Berlins Bürgermeister?"),
        ("Wrocław", "Kto mieszka we Wrocławiu dzisiaj"),
        ("Helsinki", "Mikä on Helsinkiin matka?"),
        ("Amreli district", "Amreli district is in"),
        ("Barack Obama", "Who is President Barack Obama married to?"),
        ("Tim Cook", "Is Apple CEO Tim Cook American?"),
        ("Barack Obama", "What is Barack Obama's Chicago speech about?"),
        ("Netflix", "WHO IS THE FOUNDER OF NETFLIX TODAY"),
        ("Netflix", "Who Is The Founder Of Netflix Inc Today?"),
        ("Spotify", "Is Spotify, Sweden's best, on Android?"),
        ("Spotify", "Spotify的总部在哪里？"),
        ("Norway", "Norwayの公用語は何ですか？"),
        ("東京", "東京の人口は"),
        ("서울", "서울은 어디에 있나요?"),
        ("マリー・キュリー", "マリーキュリーはどこで生まれましたか"),
        ("マリー・キュリー", "マリー・キュリーはどこで"),
        ("AKB48", "AKB48のメンバーは"),
        ("กรุงเทพ", "ประชากรของกรุงเทพคือ"),
    ],
)
def test_a_name_is_found_as_it_is_commonly_written(find: Find, subject: str, text: str) -> None:
    mention = find(subject, text)
    assert mention
    assert (mention.lowered, mention.misspelt, mention.neighbour) == (False, 0, False)
    assert mention.coverage >= 0.75


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("France", "Who leads Francce?"),
        ("Vietnam", "Who leads Vietnm?"),
        ("Vietnam", "Who leads Veitnam?"),
        ("Vietnam", "Vietna is led by"),
        ("The Hobbit", "Who wrote The Hobit?"),
        ("IKEA", "Who founded IKKEA?"),
        ("Nokia", "Who leads Nkoia?"),
        ("Toni Morrison", "Where was Tni Morrison born?"),
        ("Pablo Picasso", "Where was Pablo icasso born?"),
        ("Pablo Picasso", "Where was Pablo Piacsso born?"),
        ("Pablo Picasso", "Where was Paablo Picasso born?"),
    ],
)
def test_one_typing_error_is_read_and_counted(find: Find, subject: str, text: str) -> None:
    mention = find(subject, text)
    assert mention
    assert (mention.lowered, mention.misspelt, mention.neighbour) == (False, 1, False)


@real
@pytest.mark.parametrize("text", ["who leads vietnm?", "where is ikkea based", "who started ikkea"])
def test_a_typing_error_in_lower_case_is_both(find: Find, text: str) -> None:
    mention = find("Vietnam" if "vietnm" in text else "IKEA", text)
    assert mention
    assert (mention.lowered, mention.misspelt) == (True, 1)


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Adidas", "Who founded Adecco?"),
        ("Australia", "What is the capital of Austria?"),
        ("Netflix", "Who founded Netscape?"),
        ("Iran", "What is the capital of Iraq?"),
        ("Nigeria", "What is the capital of Niger?"),
        ("Niger", "What is the capital of Nigeria?"),
        ("Nigeria", "Which Nigerian won?"),
        ("Israel", "Which Israeli won?"),
        ("Slovakia", "What is the capital of Slovenia?"),
        ("The Hobbit", "When was The Habit published?"),
        ("C", "Who invented C++?"),
        ("C", "Who invented C#?"),
        ("C++", "Who invented C?"),
        ("US", "What is used by UPS?"),
        ("UK", "What is the capital of Ukraine?"),
        ("John Smith", "Where was Smith born?"),
        ("Martin Luther King", "Where was King born?"),
        ("Windows 95", "Who made Windows 98?"),
        ("World War II", "When did World War III end?"),
        ("東京", "京東の本社は"),
        ("東京", "京都の人口は"),
        ("Ямал", "Где находится Урал?"),
        ("カナ", "かなはどこ"),
        ("The Name of the Rose", "When was The Name of the Wind published?"),
        ("University of Oxford", "Where is the University of Leipzig?"),
    ],
)
def test_another_name_is_not_found(find: Find, subject: str, text: str) -> None:
    mention = find(subject, text)
    assert mention is None or mention.coverage < 0.5


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Marie Curie", "Where was Curie born?"),
        ("Nelson Mandela", "What is Mandela's birthplace?"),
        ("Johann Sebastian Bach", "Where was Bach born?"),
        ("Johann Sebastian Bach", "Where was Sebastian Bach born?"),
    ],
)
def test_a_rare_surname_is_a_part_of_its_name(find: Find, subject: str, text: str) -> None:
    mention = find(subject, text)
    assert mention
    assert (mention.lowered, mention.neighbour) == (False, False)
    assert mention.coverage < 0.75


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Nokia", "Who founded Nokia Tyres?"),
        ("Paris", "Where was Paris Hilton born?"),
        ("Pride and Prejudice", "Who wrote Pride and Prejudice and Zombies?"),
        ("Korea", "What is the capital of South Korea?"),
        ("Frankenstein", "Who made Bride of Frankenstein?"),
        (".NET", "Who develops ASP.NET?"),
        ("Barack Obama", "How long is Obama Boulevard?"),
    ],
)
def test_a_word_of_another_name_beside_it_is_noted(find: Find, subject: str, text: str) -> None:
    mention = find(subject, text)
    assert mention
    assert mention.neighbour


@real
@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Barack Obama", "Who is Michelle Obama married to?"),
        ("Barack Obama", "Michelle Obama is married to"),
        ("Barack Obama", "who is michelle obama married to"),
        ("Marie Curie", "Where was P. Curie born?"),
        ("Marie Curie", "Pierre Curie was born in"),
    ],
)
def test_a_surname_behind_another_first_name_is_not_looked_up_and_has_a_neighbour(
    real_base: lemoe.BaseModel, find: Find, subject: str, text: str
) -> None:
    assert find(subject, text) is None
    reader = WordReader()
    reader.push(text.encode())
    lexicon = get_lexicon(real_base)
    mention = Subject(subject, lexicon).find_mention(Sentence(reader.words, lexicon))
    assert mention
    assert mention.neighbour


@real
@pytest.mark.parametrize(
    ("subject", "text", "words"),
    [
        ("The Name of the Rose", "The name of the author of The Name of the Rose is", "the name of the rose"),
        ("The Name of the Rose", "the date of the first edition of the name of the rose", "the name of the rose"),
        ("The Name of the Rose", "The author of Name of the Rose is", "name of the rose"),
        ("University of Oxford", "Who is the head of the University of Oxford?", "university of oxford"),
        ("University of Oxford", "Who is the head of Oxford University then?", "oxford university"),
        ("The Hobbit", "The author of the Hobbit is", "the hobbit"),
        ("A Doll's House", "A friend of mine saw A Doll's House in the", "a doll s house"),
        ("Marie Curie", "The birthplace of Curie, Marie is", "curie marie"),
        ("Marie Curie", "Is Michelle Curie a daughter of Marie Curie?", "marie curie"),
        ("John Kennedy", "Where was John Fitzgerald Kennedy born?", "john fitzgerald kennedy"),
    ],
)
def test_a_mention_has_the_positions_of_its_own_words(find: Find, subject: str, text: str, words: str) -> None:
    mention = find(subject, text)
    assert mention
    assert words_at(text, mention.positions) == words


@real
def test_a_mention_of_a_word_that_grows_into_another_one_is_withdrawn(find: Find) -> None:
    assert find("Us", "Us") is not None
    for subject, text in (("Us", "Used"), ("C", "C++"), ("Franz", "Franzesco"), ("The Nile", "the Nilemann")):
        assert find(subject, text) is None


@real
def test_the_beginning_of_a_word_is_no_mention_although_its_plural_would_be(real_base: lemoe.BaseModel) -> None:
    subject = Subject("Mars", get_lexicon(real_base))
    words = [Word("the", True, True), Word("mar", True, False, adjacent=True)]
    assert subject.mention_at_end(Sentence(words, get_lexicon(real_base), growing=True)) is None
    assert subject.mention_at_end(Sentence([words[0], Word("mars", True, False)], get_lexicon(real_base))) is not None
    book = Subject("The Book of Whales", get_lexicon(real_base))
    whale = [Word(text, True, False) for text in ("the", "book", "of", "whale")]
    assert book.mention_at_end(Sentence(whale, get_lexicon(real_base))) is not None


@real
def test_names_are_told_by_how_often_they_have_a_capital(real_base: lemoe.BaseModel) -> None:
    lexicon = get_lexicon(real_base)
    assert all(map(lexicon.is_name, ("michelle", "pierre", "france", "obama")))
    assert not any(map(lexicon.is_name, ("who", "will", "in", "name", "airport")))


@real
def test_the_index_gives_a_rare_surname_whatever_else_is_stored(real_base: lemoe.BaseModel) -> None:
    index = SubjectIndex(get_lexicon(real_base))
    numbers = [index.add(name) for name in ("Marie Curie", "Pierre Curie", "Adam Smith", "Barack Obama")]
    assert candidates_of(index, "Curie", get_lexicon(real_base)) == numbers[:2]
    assert candidates_of(index, "Smith", get_lexicon(real_base)) == []


def candidates_of(index: SubjectIndex, text: str, lexicon: Lexicon) -> list[int]:
    reader = WordReader()
    reader.push(text.encode())
    candidates = index.find_candidates(reader.words)
    return [n for n in candidates if index.subjects[n].mention_at_end(Sentence(reader.words, lexicon))]
