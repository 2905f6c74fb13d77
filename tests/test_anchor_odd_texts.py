"""Edits and texts of any characters: emoji, signs and marks have no word in them, and must not fail."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_anchor_gate import Fact, make_anchor, make_gate, read_states, state_at_end
from test_cli import lemoe_command

import lemoe
from lemoe.data.conflicts import find_conflicts
from lemoe.routing.anchor.anchors import build_gate
from lemoe.routing.anchor.subject_index import MAX_SUBJECT_WORDS
from lemoe.routing.anchor.words import WordReader

SettingsOf = Callable[..., lemoe.Settings]

WORDLESS = ("!!!", "🎻", "¿?", "\u0301\u0302", "…", "\u200b", "†‡")
ODD: tuple[Fact, ...] = (
    *((sign, f"The band {sign} comes from the town of", "Bergen") for sign in WORDLESS),
    (None, "🎻 🎺", "bagpipe"),
    (None, "1984 42", "7"),
    ("7", "7", "8"),
    ("The Eiffel Tower of the city of Paris in France", "It is", "Rome"),  # longer than the prompt, and not in it
    ("The Nile", "🎻🎻", "Red Sea"),
)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
any_texts = st.one_of(texts, st.sampled_from([*WORDLESS, "The Nile", "Ann-Lee's", "ǅ", "ﬃ", "½", "İ", "ß"]))
few_examples = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("fact", ODD)
def test_an_edit_of_any_characters_is_reached_by_its_own_prompt(
    base: lemoe.BaseModel, anchor: SettingsOf, fact: Fact
) -> None:
    gate = make_gate(base, [fact], anchor())
    assert state_at_end(base, gate, fact[1]).edit == 0


@pytest.mark.parametrize("sign", WORDLESS)
def test_a_subject_without_a_word_is_mentioned_by_no_other_text(
    base: lemoe.BaseModel, anchor: SettingsOf, sign: str
) -> None:
    gate = make_gate(base, [(sign, f"The band {sign} comes from", "Bergen")], anchor())
    for text in ("The band comes from", f"Where does {sign} come from", sign, "The Nile flows into the"):
        assert {state.edit for state in read_states(gate, base.tokenizer(text).input_ids)} == {-1}


def test_a_prompt_without_a_word_is_a_whole_text_or_line_and_no_ending_of_another(
    base: lemoe.BaseModel, anchor: SettingsOf
) -> None:
    gate = make_gate(base, [(None, "?", "yes"), (None, "🎻", "no")], anchor())
    for text, edit in (("?", 0), ("🎻", 1), ("Well\n?", 0), ("<eos>?", 0), ("Who is it ?", -1), ("I play the 🎻", -1)):
        assert state_at_end(base, gate, text).edit == edit


def test_a_subject_of_more_words_than_any_name_is_looked_for_in_no_text(
    base: lemoe.BaseModel, anchor: SettingsOf
) -> None:
    name = " ".join(f"n{number}" for number in range(MAX_SUBJECT_WORDS + 1))
    gate = make_gate(base, [(name, "It is", "so"), (name.rsplit(" ", 1)[0], "It was", "so")], anchor())
    reader = WordReader()
    reader.push(name.encode())
    words = reader.words
    assert {number for end in range(1, len(words) + 1) for number in gate.index.find_candidates(words[:end])} == {1}
    assert state_at_end(base, gate, "It is").edit == 0


def test_signs_that_differ_are_other_questions() -> None:
    edits = [lemoe.Edit(sign, "Bergen", id=sign) for sign in ("!", "?", "!!!", "...")]
    assert find_conflicts(edits) == []
    assert find_conflicts([lemoe.Edit("Who?", "Ann", id="a"), lemoe.Edit("who", "Ann", id="b")]) != []


def test_edits_of_any_characters_are_taught_asked_and_measured_like_others(
    base: lemoe.BaseModel, tiny_folder: Callable[[str], Path], anchor: SettingsOf, tmp_path: Path
) -> None:
    path = tmp_path / "odd.jsonl"
    rows = [
        {"id": str(n), "prompt": prompt, "target": target, **({"subject": subject} if subject else {})}
        for n, (subject, prompt, target) in enumerate(ODD)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where = ("-m", tiny_folder("llama"), "--device", "cpu", "-q")
    assert lemoe_command("plan", path, *where).exit_code == 0
    (tmp_path / "small.yaml").write_text("layer: 1\nsteps: 2\nretries: 0\nvariants: 3\nnegatives: 1\n")
    assert lemoe_command("edit", path, *where, "--config", tmp_path / "small.yaml").exit_code == 0
    with lemoe.insert(base, tmp_path / "odd.lemoe") as edited:
        routes = edited.explain([edited.base.tokenizer(prompt).input_ids for _, prompt, _ in ODD])
    assert {route.scope for route in routes} == {"in"}
    adaptor = ("-a", tmp_path / "odd.lemoe")
    prompts = [prompt for _, prompt, _ in ODD]
    assert lemoe_command("ask", *prompts, *where, *adaptor, "--max-new-tokens", "2").exit_code == 0
    assert lemoe_command("eval", path, *where, *adaptor).exit_code == 0


@given(st.lists(st.tuples(st.none() | any_texts, any_texts, any_texts), min_size=1, max_size=4), any_texts)
@few_examples
def test_any_text_makes_an_anchor_and_any_text_is_read(
    base: lemoe.BaseModel, anchor: SettingsOf, facts: list[Fact], text: str
) -> None:
    anchors = []
    for fact in facts:
        try:
            anchors.append(make_anchor(base, fact))
        except ValueError:  # which the reader of edits refuses, by name
            assume(False)
    gate = build_gate(base, anchors, anchor())
    for own in anchors:
        reached = read_states(gate, own.prompt)[-1].edit
        assert gate.anchors[reached].prompt[1:] == own.prompt[1:]
        assert reached >= 0
    read_states(gate, base.tokenizer(text + "".join(subject or prompt for subject, prompt, _ in facts)).input_ids)
