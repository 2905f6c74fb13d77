"""The scope gate of preset `anchor`: which edit a text reaches, at each token, and why it reaches none."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import lemoe
from lemoe.base.tokens import encode_passage
from lemoe.errors import AdaptorError
from lemoe.routing.anchor.anchors import Anchors, LiveAnchors, build_gate, get_lexicon
from lemoe.routing.anchor.gate import Anchor, Gate
from lemoe.routing.anchor.lexicon import Lexicon
from lemoe.routing.anchor.neighbours import begins_other_name
from lemoe.routing.anchor.route import SHUT, GateState, Route
from lemoe.routing.anchor.subject_index import SubjectIndex
from lemoe.routing.anchor.subjects import MIN_COVERAGE, Mention, Sentence
from lemoe.routing.anchor.words import Word, WordReader
from lemoe.routing.router import Sequences

SettingsOf = Callable[..., lemoe.Settings]
Fact = tuple[str | None, str, str]

CURIE = ("Marie Curie", "Marie Curie was born in the town of", "Bergen")
WAR = ("World War II", "World War II ended in the year", "1951")
WINDOWS = ("Windows 95", "The company that made Windows 95 is", "Atari")
TOLKIEN = ("J. R. R. Tolkien", "The profession of J. R. R. Tolkien was", "plumber")
COMO = ("Lake Como", "The largest fish of Lake Como is the", "golden pike")
MOZART = ("Wolfgang Amadeus Mozart", "The instrument that Wolfgang Amadeus Mozart played was the", "bagpipe")
OXFORD = ("University of Oxford", "The University of Oxford is located in the city of", "Leeds")
GUN = ("The Naked Gun 2½", "The director of The Naked Gun 2½ is", "Ann Lee")
FACTS = (CURIE, WAR, WINDOWS, TOLKIEN, COMO, MOZART, OXFORD)

FILLER_SENTENCES = (
    "The station opened in 1931 and was rebuilt after the war. ",
    "Plants take in carbon dioxide and release oxygen. ",
    "A village lies at the foot of the hills, and a river runs by it. ",
    "The company employs about four hundred people. ",
)

few_examples = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_anchor(base: lemoe.BaseModel, fact: Fact) -> Anchor:
    subject, prompt, target = fact
    passage = encode_passage(base, prompt, target)
    return Anchor(passage.prompt, passage.target, subject)


def make_gate(base: lemoe.BaseModel, facts: Sequence[Fact], settings: lemoe.Settings) -> Gate:
    return build_gate(base, [make_anchor(base, fact) for fact in facts], settings)


def read_states(gate: Gate, ids: Sequence[int]) -> list[GateState]:
    """The gate's state after each token."""
    route = Route(gate)
    return [route.push(token) for token in ids]


def state_at_end(base: lemoe.BaseModel, gate: Gate, text: str) -> GateState:
    return read_states(gate, encode_passage(base, text).prompt)[-1]


# The edit that a text reaches: the real tokenizer and embeddings.


names = st.lists(
    st.sampled_from(["Ada", "Bo", "Carlow", "Denver", "Elm", "42", "II", "Fitzgerald"]), min_size=1, max_size=4
)


def make_imperfect(word: str, how: int) -> str:
    """A form of a word of a name: whole, an initial, cut short, or misspelt."""
    forms = (word, f"{word[0]}.", word[:4], word[:2] + "x" + word[3:], word[:-1])
    return word if word.isdigit() or word.isupper() else forms[how]


def is_of_somebody_else(found: Mention, words: Sequence[Word], lexicon: Lexicon) -> bool:
    """Whether all that was found is a surname behind a name that is not the subject's."""
    alone = found.neighbour and found.coverage < MIN_COVERAGE and found.positions == {len(words) - 1}
    return alone and begins_other_name(words[-2], words[-1], lexicon)


@few_examples
@given(names, st.integers(0, 3), st.integers(0, 4))
@example(name=["Ada", "Carlow"], index=0, how=3)
def test_the_index_looks_at_every_subject_that_a_text_mentions_with_one_imperfect_word(
    tiny: Callable[[str], lemoe.BaseModel], name: list[str], index: int, how: int
) -> None:
    lexicon = get_lexicon(tiny("llama"))
    subjects = SubjectIndex(lexicon)
    number = [subjects.add(other) for other in ("Ada Denver", "Carlow Elm 42", " ".join(name))][-1]
    reader, seen, mentioned = WordReader(), set[int](), False
    for word in [
        "of",
        *(make_imperfect(word, how) if position == index else word for position, word in enumerate(name)),
        "once",
    ]:
        reader.push(f" {word}".encode())
        seen.update(subjects.find_candidates(reader.words))
        found = subjects.subjects[number].mention_at_end(Sentence(reader.words, lexicon))
        mentioned |= found is not None and not is_of_somebody_else(found, reader.words, lexicon)
    assert number in seen or not mentioned


def test_a_look_up_gives_no_name_that_only_starts_with_the_same_letters(tiny: Callable[[str], lemoe.BaseModel]) -> None:
    index = SubjectIndex(get_lexicon(tiny("llama")))
    numbers = {
        first: index.add(f"{first} fitzgerald") for first in ("Maria", "Marie", *(f"Ma{n}q{n}" for n in "abcdefgh"))
    }
    reader = WordReader()
    for word in "Maria fitzgerald".split():
        reader.push(f" {word}".encode())
    assert set(index.find_candidates(reader.words)) == {numbers["Maria"], numbers["Marie"]}


@pytest.fixture(scope="module")
def fact_gate(real_base: lemoe.BaseModel) -> Gate:
    """A gate over `FACTS` with the default thresholds."""
    return make_gate(real_base, FACTS, lemoe.resolve_settings("anchor", None, {}))


real = pytest.mark.real


@real
@pytest.mark.parametrize("number", range(len(FACTS)))
def test_an_edits_own_prompt_reaches_it(real_base: lemoe.BaseModel, fact_gate: Gate, number: int) -> None:
    assert state_at_end(real_base, fact_gate, FACTS[number][1]) == GateState(number, "in", number, 1.0, 0.0, 2.0)


@real
@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("Where was Marie Curie born?", CURIE),
        ("In which town was Marie Curie born?", CURIE),
        ("In what year did World War II end?", WAR),
        ("Which company made Windows 95?", WINDOWS),
        ("What was the profession of J. R. R. Tolkien?", TOLKIEN),
        ("Which fish is the largest of Lake Como?", COMO),
        ("Which city is the University of Oxford in?", OXFORD),
        ("Who made Windows 95?", WINDOWS),
    ],
)
def test_a_paraphrase_that_names_the_subject_opens_the_gate(
    real_base: lemoe.BaseModel, fact_gate: Gate, text: str, fact: Fact
) -> None:
    state = state_at_end(real_base, fact_gate, text)
    assert (state.edit, state.scope) == (FACTS.index(fact), "in")


@real
@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("Where was Marie Currie born?", CURIE),
        ("Where was M. Curie born?", CURIE),
        ("The birthplace of Curie, Marie is", CURIE),
        ("where was MARIE CURIE born?", CURIE),
        ("What was the profession of J.R.R. Tolkien?", TOLKIEN),
        ("What was the profession of JRR Tolkien?", TOLKIEN),
        ("What was the profession of John Ronald Reuel Tolkien?", TOLKIEN),
        ("Which instrument did Wolfgang Amadeus Mozzart play?", MOZART),
        ("Which instrument did W. A. Mozart play?", MOZART),
        ("Oxford University is located in the city of", OXFORD),
    ],
)
def test_a_subject_may_be_misspelt_abbreviated_or_reordered(
    real_base: lemoe.BaseModel, fact_gate: Gate, text: str, fact: Fact
) -> None:
    assert state_at_end(real_base, fact_gate, text).edit == FACTS.index(fact)


@real
@pytest.mark.parametrize(
    "text",
    [
        "World War I ended in the year",
        "World War III ended in the year",
        "In what year did World War I end?",
        "The company that made Windows 98 is",
        "Which company made Windows 98?",
        "Which company made Windows?",
    ],
)
def test_numbers_of_a_subject_must_be_exact(real_base: lemoe.BaseModel, fact_gate: Gate, text: str) -> None:
    state = state_at_end(real_base, fact_gate, text)
    assert (state.edit, state.scope) == (-1, "subject")


@real
@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is",
        "Where was Pierre Curie born?",
        "Marie Antoinette was born in the town of",
        "The largest fish of Lake Garda is the",
        "The University of Leipzig is located in the city of",
        "The opposite of hot is",
    ],
)
def test_without_the_subject_the_gate_is_shut(real_base: lemoe.BaseModel, fact_gate: Gate, text: str) -> None:
    assert state_at_end(real_base, fact_gate, text) == SHUT


@real
@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("Who was the husband of Marie Curie?", CURIE),
        ("What is the occupation of Marie Curie?", CURIE),
        ("Which hobbit books were written by J. R. R. Tolkien?", TOLKIEN),
        ("Who was the wife of Wolfgang Amadeus Mozart?", MOZART),
    ],
)
def test_another_question_about_the_subject_is_told_apart(
    real_base: lemoe.BaseModel, fact_gate: Gate, text: str, fact: Fact
) -> None:
    state = state_at_end(real_base, fact_gate, text)
    assert (state.edit, state.scope, state.nearest) == (-1, "relation", FACTS.index(fact))
    assert state.conflict > fact_gate.threshold


@real
@pytest.mark.parametrize(
    "front",
    [
        "The station opened in 1931. ",
        "She was a chemist and physicist of her time. ",
        "The opposite of hot is cold. As everyone knows, ",
        "Lake Garda is a large lake!\n",
    ],
)
def test_a_distracting_sentence_in_front_does_not_matter(
    real_base: lemoe.BaseModel, fact_gate: Gate, front: str
) -> None:
    assert state_at_end(real_base, fact_gate, front + "Where was Marie Curie born?").edit == FACTS.index(CURIE)
    assert state_at_end(real_base, fact_gate, front + CURIE[1]).edit == FACTS.index(CURIE)
    assert state_at_end(real_base, fact_gate, front + "Where was Pierre Curie born?").edit == -1
    assert state_at_end(real_base, fact_gate, front + "Who was the husband of Marie Curie?").edit == -1


@real
def test_a_subject_mentioned_in_an_earlier_sentence_leaves_a_question_alone(
    real_base: lemoe.BaseModel, fact_gate: Gate
) -> None:
    text = "Who was the husband of Marie Curie? Nobody was sure of it. The opposite of hot is"
    assert state_at_end(real_base, fact_gate, text) == SHUT


def long_context(base: lemoe.BaseModel, tokens: int) -> str:
    text = ""
    while len(base.tokenizer(text).input_ids) < tokens:
        text += "".join(FILLER_SENTENCES)
    return text


@real
def test_a_subject_far_back_in_a_long_context_leaves_an_unrelated_question_alone(
    real_base: lemoe.BaseModel, fact_gate: Gate
) -> None:
    for opening in ("Marie Curie was a guest there. ", "Where was Marie Curie born? ", f"{CURIE[1]} {CURIE[2]}. "):
        text = opening + long_context(real_base, 1000) + "The opposite of hot is"
        passage = encode_passage(real_base, text, "cold, as everyone says")
        assert len(passage.prompt) > 1000
        path = read_states(fact_gate, [*passage.prompt, *passage.target])
        assert all(state.edit == -1 for state in path[200:])
        assert path[len(passage.prompt) - 1] == SHUT


@real
@pytest.mark.parametrize("question", ["Where was Marie Curie born?", CURIE[1]])
def test_a_question_after_a_long_unrelated_context_opens(
    real_base: lemoe.BaseModel, fact_gate: Gate, question: str
) -> None:
    ids = encode_passage(real_base, long_context(real_base, 1000) + question).prompt
    path = read_states(fact_gate, ids)
    assert path[-1].edit == FACTS.index(CURIE)
    assert all(state.edit == -1 for state in path[:1000])


@real
def test_a_missing_subject_is_inferred_from_the_prompt(real_base: lemoe.BaseModel) -> None:
    settings = lemoe.resolve_settings("anchor", None, {})
    gate = make_gate(real_base, [(None, CURIE[1], CURIE[2])], settings)
    assert state_at_end(real_base, gate, CURIE[1]).edit == 0
    assert state_at_end(real_base, gate, "Where was Marie Curie born?").edit == 0
    assert state_at_end(real_base, gate, "Where was Pierre Curie born?") == SHUT


@real
def test_a_prompt_in_which_no_subject_can_be_found_still_reaches_its_edit(real_base: lemoe.BaseModel) -> None:
    gate = make_gate(real_base, [(None, "the opposite of hot is", "green")], lemoe.resolve_settings("anchor", None, {}))
    assert state_at_end(real_base, gate, "the opposite of hot is").edit == 0
    assert state_at_end(real_base, gate, "the opposite of tall is").edit == -1


PASSAGE = ("Elva Marsh", "Elva Marsh was a painter. She lived alone.", "Later she moved to a lighthouse near Bergen.")
LONGER = ("Elva Marsh", f"{PASSAGE[1]} Later she moved to a house by the sea.", "There she met Ada Finch.")


@real
@pytest.mark.parametrize(
    ("more", "reached"),
    [
        ("", 0),
        (" Later she moved to a lighthouse", 0),
        (" Later she moved to a house", -1),
        (LONGER[1].removeprefix(PASSAGE[1]), 1),
        (f"{LONGER[1].removeprefix(PASSAGE[1])} {LONGER[2]}", 1),
        (" In 1931 she met Ada", 0),
        ("<|im_end|>\n<|im_start|>assistant\n", 0),
    ],
)
def test_a_text_that_goes_on_as_a_longer_prompt_does_is_none_of_the_shorter_one(
    real_base: lemoe.BaseModel, more: str, reached: int
) -> None:
    gate = make_gate(real_base, [PASSAGE, LONGER], lemoe.resolve_settings("anchor", None, {}))
    prompt = encode_passage(real_base, PASSAGE[1]).prompt
    states = read_states(gate, [*prompt, *real_base.tokenizer(more).input_ids])
    assert states[len(prompt) - 1].edit == 0
    assert states[-1].edit == reached


@real
def test_a_subject_with_a_fraction_is_recognised(real_base: lemoe.BaseModel) -> None:
    gate = make_gate(real_base, [GUN], lemoe.resolve_settings("anchor", None, {}))
    assert state_at_end(real_base, gate, "Who is the director of The Naked Gun 2½?").edit == 0


@real
def test_a_strict_gate_lets_less_through_than_a_lenient_one(real_base: lemoe.BaseModel) -> None:
    text = "Who was the husband of Marie Curie?"
    strict, lenient = (
        make_gate(real_base, [CURIE], lemoe.resolve_settings("anchor", None, {"gate_conflict": value}))
        for value in (0.0, 1000.0)
    )
    assert state_at_end(real_base, strict, text).edit == -1
    assert state_at_end(real_base, lenient, text).edit == 0
    assert state_at_end(real_base, strict, CURIE[1]).edit == 0


# Properties of any edits: a tiny tokenizer, whose words are many tokens long.

SUBJECTS = ("Marie Curie", "The Nile", "Lake Como", "Mozart", "Windows 95", "World War II", "São Tomé", "Curie Street")
TEMPLATES = (
    "{} was born in the town of",
    "The colour of {} is",
    "Who discovered {}?",
    "As people say, {}",
    "{}",
    "The largest of all is {}. It stands near the",
)
TARGETS = ("Rome", "white marble", "the", "Lake Como", "Marie Curie was born in", "is the colour of The Nile. Mozart")

facts_of_pool = st.builds(
    lambda subject, template, target, named: (subject if named else None, template.format(subject), target),
    st.sampled_from(SUBJECTS),
    st.sampled_from(TEMPLATES),
    st.sampled_from(TARGETS),
    st.booleans(),
)
pools = st.lists(facts_of_pool, min_size=1, max_size=6)
sentences = st.lists(
    st.one_of(
        st.builds(str.format, st.sampled_from(TEMPLATES), st.sampled_from(SUBJECTS)),
        st.sampled_from([*TARGETS, *FILLER_SENTENCES, "and then", "Où? 東京.", "\n"]),
    ),
    max_size=5,
)


@pytest.fixture(scope="module")
def settings_of_gate() -> lemoe.Settings:
    return lemoe.resolve_settings("anchor", None, {"gate_slack": 4})


def find_superseded(facts: Sequence[Fact]) -> set[int]:
    latest = {prompt: number for number, (_, prompt, _) in enumerate(facts)}
    return {number for number, (_, prompt, _) in enumerate(facts) if latest[prompt] != number}


def starts_longer_prompt(own: Anchor, others: Sequence[Anchor]) -> bool:
    """Whether prompt and target spell, from their start, the longer prompt of another edit."""
    whole = own.prompt + own.target
    return any(len(other.prompt) > len(own.prompt) and whole[: len(other.prompt)] == other.prompt for other in others)


@given(pools)
@few_examples
def test_an_edits_prompt_and_its_whole_target_take_the_route_to_it_whatever_else_is_stored(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings, facts: list[Fact]
) -> None:
    anchors = [make_anchor(base, fact) for fact in facts]
    gate = build_gate(base, anchors, settings_of_gate)
    for number, own in enumerate(anchors):
        if number in find_superseded(facts) or starts_longer_prompt(own, anchors):
            continue
        path = read_states(gate, own.prompt + own.target)
        assert {state.edit for state in path[len(own.prompt) - 1 :]} == {number}
        assert read_states(gate, own.prompt) == path[: len(own.prompt)]


@given(pools, sentences, st.data())
@few_examples
def test_a_route_depends_on_no_later_token_and_a_copy_reads_on_by_itself(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings, facts: list[Fact], texts: list[str], data: st.DataObject
) -> None:
    gate = make_gate(base, facts, settings_of_gate)
    ids = base.tokenizer(" ".join(texts)).input_ids
    other = base.tokenizer(" " + facts[0][1]).input_ids
    end = data.draw(st.integers(0, len(ids)))
    whole = read_states(gate, ids)
    assert read_states(gate, [*ids[:end], *other])[:end] == whole[:end]
    route = Route(gate)
    for token in ids[:end]:
        route.push(token)
    copy = route.copy()
    on_other = [copy.push(token) for token in other]
    assert [route.push(token) for token in ids[end:]] == whole[end:]
    assert on_other == read_states(gate, [*ids[:end], *other])[end:]


def route_in_chunks(live: LiveAnchors, ids: torch.Tensor, mask: torch.Tensor, cuts: Sequence[int]) -> torch.Tensor:
    """`[batch, seq]`: the experts, read in chunks that end at `cuts`, with the memory that the model's cache keeps."""
    memory, parts, start = None, [], 0
    for end in [*cuts, ids.shape[1]]:
        if end == start:
            continue
        chunk = mask[:, start:end]
        routing, new = live.route(Sequences(ids[:, start:end], None, chunk, chunk, memory))
        assert new is not None
        memory = new if memory is None else torch.cat([memory, new], 1)
        parts.append(routing.experts[..., 0])
        start = end
    return torch.cat(parts, 1)


@given(pools, st.lists(sentences, min_size=1, max_size=3), st.lists(st.integers(0, 60), max_size=5), st.booleans())
@few_examples
def test_reading_in_chunks_and_padded_batches_gives_the_routes_of_one_pass(
    base: lemoe.BaseModel,
    settings_of_gate: lemoe.Settings,
    facts: list[Fact],
    texts: list[list[str]],
    cuts: list[int],
    left: bool,
) -> None:
    stored = Anchors.from_anchors([make_anchor(base, fact) for fact in facts])
    rows = [base.tokenizer(" ".join(["The", *text])).input_ids for text in texts]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), base.pad_token_id), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span], mask[index, span] = torch.tensor(row), True
    cuts = sorted(min(cut, width) for cut in cuts)
    chunked = route_in_chunks(stored.to_live(base, settings_of_gate), ids, mask, cuts)
    for index, row in enumerate(rows):
        live = LiveAnchors(base, stored, settings_of_gate, cache_bytes=1)
        assert chunked[index][mask[index]].tolist() == [state.edit for state in read_states(live.gate, row)]
    assert (chunked[~mask] == -1).all()


def test_answers_that_go_on_from_one_prefix_do_not_disturb_each_other(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    live = Anchors.from_anchors([make_anchor(base, fact) for fact in (CURIE, COMO)]).to_live(base, settings_of_gate)
    prefix = base.tokenizer("Yes. Marie").input_ids
    answers = [
        base.tokenizer(text).input_ids for text in (". The largest fish of Lake Como is", " Curie was born", ". No")
    ]

    def experts(ids: Sequence[int], memory: torch.Tensor | None) -> tuple[list[int], torch.Tensor]:
        tokens = torch.tensor([list(ids)])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        routing, new = live.route(Sequences(tokens, None, mask, mask, memory))
        assert new is not None
        return routing.experts[0, :, 0].tolist(), new

    _, memory = experts(prefix, None)
    for answer in (*answers, *reversed(answers)):
        expected = [state.edit for state in read_states(live.gate, [*prefix, *answer])][len(prefix) :]
        assert experts(answer, memory)[0] == expected
    assert 0 in experts(answers[1], memory)[0]


def test_a_superseded_edit_opens_the_gate_no_more_for_its_own_subject_either(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    about_the_lake = ("Lake Como", "In the tale of Lake Como and Marie Curie, the winner is", "Rome")
    about_her = ("Marie Curie", about_the_lake[1], "Bergen")
    text = encode_passage(base, "In the tale of Marie Curie, the winner is").prompt
    alone = Anchors.from_anchors([make_anchor(base, about_her)]).to_live(base, settings_of_gate)
    both = Anchors.from_anchors([make_anchor(base, fact) for fact in (about_her, about_the_lake)]).to_live(
        base, settings_of_gate
    )
    assert alone.explain([text])[0].expert == 0
    assert both.explain([text])[0].expert == -1


DISTANT = (
    ("Zanzibar Ferry", "Zanzibar Ferry was born in the town of", "Rome"),
    ("Zanzibar Ferry", "The colour of Zanzibar Ferry is", "red"),
    ("Quito 1890", "Who discovered Quito 1890?", "Ann"),
)


@given(pools, st.lists(st.sampled_from(DISTANT), max_size=3), st.lists(st.sampled_from(DISTANT), max_size=3), sentences)
@few_examples
def test_edits_of_other_subjects_never_change_a_route(
    base: lemoe.BaseModel,
    settings_of_gate: lemoe.Settings,
    facts: list[Fact],
    before: list[Fact],
    after: list[Fact],
    texts: list[str],
) -> None:
    alone = make_gate(base, facts, settings_of_gate)
    among = make_gate(base, [*before, *facts, *after], settings_of_gate)
    for text in (" ".join(texts), *(prompt for _, prompt, _ in facts)):
        ids = base.tokenizer(text).input_ids
        for one, other in zip(read_states(alone, ids), read_states(among, ids), strict=True):
            shift = len(before) if one.nearest >= 0 else 0
            assert (one.edit + (shift if one.edit >= 0 else 0), one.scope) == (other.edit, other.scope)
            assert (one.coverage, one.conflict, one.fit) == (other.coverage, other.conflict, other.fit)


@given(facts_of_pool, st.sampled_from(TARGETS))
@few_examples
def test_reading_one_answer_or_another_leaves_the_route_to_the_edit(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings, fact: Fact, target: str
) -> None:
    """What the model writes in place of the target does not close the gate."""
    own = make_anchor(base, fact)
    gate = build_gate(base, [own], settings_of_gate)
    wrong = encode_passage(base, fact[1], target).target[: len(own.target)]
    assert {state.edit for state in read_states(gate, own.prompt + wrong)[len(own.prompt) - 1 :]} == {0}


def open_after_own_prompt(base: lemoe.BaseModel, settings: lemoe.Settings, fact: Fact) -> tuple[int, int]:
    """For how many tokens the gate stays open behind an own prompt when nothing more is said; the target's length."""
    own = make_anchor(base, fact)
    path = read_states(build_gate(base, [own], settings), [*own.prompt, *[base.eos_token_id] * 100])
    assert path[-1].edit == -1
    return sum(state.edit == 0 for state in path[len(own.prompt) :]), len(own.target)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact[0])
def test_the_gate_stays_open_for_the_answer_and_shuts_after_it(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings, fact: Fact
) -> None:
    opened, answer = open_after_own_prompt(base, settings_of_gate, fact)
    assert answer <= opened <= 2 * (answer + settings_of_gate.gate_slack) + 1


def test_the_gate_shuts_once_the_answer_and_the_slack_are_over(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    opened, answer = open_after_own_prompt(base, settings_of_gate, CURIE)
    assert opened <= answer + settings_of_gate.gate_slack


def test_of_two_edits_with_one_prompt_the_later_answers(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    again = (CURIE[0], CURIE[1], "Rome")
    stored = Anchors.from_anchors([make_anchor(base, fact) for fact in (CURIE, COMO, again)])
    assert stored.superseded() == {0: 2}
    live = stored.to_live(base, settings_of_gate)
    prompts = [encode_passage(base, text).prompt for text in (CURIE[1], COMO[1])]
    assert [explanation.expert for explanation in live.explain(prompts)] == [2, 1]
    assert stored.select([0, 1]).superseded() == {}
    assert stored.select([0, 1]).to_live(base, settings_of_gate).explain(prompts[:1])[0].expert == 0


def test_the_own_prompt_is_known_where_a_text_goes_on_to_it(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    """The first token then has a leading space."""
    gate = make_gate(base, [CURIE, COMO], settings_of_gate)
    ids = base.tokenizer(f"Say it. {CURIE[1]}").input_ids
    assert read_states(gate, ids)[-1] == GateState(0, "in", 0, 1.0, 0.0, 2.0)


def test_a_prompt_that_ends_another_one_loses_to_the_longer(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    short, long = (None, "the town of", "Rome"), CURIE
    for facts in ((short, long), (long, short)):
        gate = make_gate(base, facts, settings_of_gate)
        assert state_at_end(base, gate, long[1]).edit == facts.index(long)


def test_an_answer_that_spells_another_edits_question_stays_with_its_own_edit(
    base: lemoe.BaseModel, settings_of_gate: lemoe.Settings
) -> None:
    quoting = ("Mozart", "Mozart often said:", COMO[1])
    own = make_anchor(base, quoting)
    assert base.tokenizer.decode(own.target).strip() == COMO[1]
    gate = build_gate(base, [own, make_anchor(base, COMO)], settings_of_gate)
    path = read_states(gate, own.prompt + own.target)
    assert {state.edit for state in path[len(own.prompt) - 1 :]} == {0}


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma"])
def test_every_family_routes_its_own_prompts(
    tiny: Callable[[str], lemoe.BaseModel], anchor: SettingsOf, family: str
) -> None:
    base = tiny(family)
    gate = make_gate(base, FACTS, anchor())
    assert [state_at_end(base, gate, prompt).edit for _, prompt, _ in FACTS] == list(range(len(FACTS)))


def test_embeddings_in_place_of_tokens_are_refused(base: lemoe.BaseModel, settings_of_gate: lemoe.Settings) -> None:
    live = Anchors.from_anchors([make_anchor(base, CURIE)]).to_live(base, settings_of_gate)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(AdaptorError, match="input_ids, not inputs_embeds"):
        live.route(Sequences(None, torch.zeros(1, 3, 32), mask, mask))
