"""Edits files: every format that is read, and everything that is refused."""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import lemoe
from lemoe.data.edits import sample_edits
from lemoe.errors import InputError
from lemoe_cli.main import cli

FACT = {"prompt": "The capital of France is", "target": "Lyon"}

ZSRE = {
    "subject": "IAAF Combined Events Challenge",
    "src": "When was the inception of IAAF Combined Events Challenge?",
    "pred": "2011",
    "rephrase": "When was the IAAF Combined Events Challenge launched?",
    "alt": "2006",
    "loc": "nq question: what is the last episode of spongebob",
    "loc_ans": "The String",
    "portability": {"New Question": "What sports event is the challenge of 2006?", "New Answer": "Athletics"},
}

COUNTERFACT = {
    "case_id": 4482,
    "requested_rewrite": {
        "prompt": "{} originates from",
        "target_new": {"str": "Philadelphia", "id": "Q935334"},
        "target_true": {"str": "London", "id": "Q84"},
        "subject": "Spike Hughes",
    },
    "paraphrase_prompts": ["Unrelated words. Spike Hughes is native to", "AAU. Spike Hughes was born in"],
    "neighborhood_prompts": ["Max Mosley originates from", "William Hogarth originated from"],
    "generation_prompts": ["Spike Hughes currently lives in"],
}

KNOWEDIT = {
    "subject": "Goursez Vreizh",
    "prompt": "The country which Goursez Vreizh is associated with is",
    "target_new": "Franche-Comté",
    "ground_truth": "France",
    "portability": {
        "Reasoning": [{"prompt": "The capital of that country is", "ground_truth": "Besançon"}],
        "Subject_Aliasing": [{"prompt": "Gorsedd of Brittany is associated with", "ground_truth": "Franche-Comté"}],
    },
    "locality": {"Relation_Specificity": [{"prompt": "The founder of Goursez Vreizh is", "ground_truth": "Jean"}]},
}

HALLUCINATION = {
    "prompt": "This is a passage about Frank McLain.",
    "target_new": "He was reelected to the Fifty-sixth Congress.",
    "subject": "Frank McLain",
    "locality_prompt": "At Creighton, you are part of",
    "locality_ground_truth": "thousands of faculty",
}

TEMPORAL = {
    "prompt": "TikTok is",
    "target_new": "a popular social media platform that allows users to create short videos",
    "subject": "TikTok",
    "ood_rephrase": "TikTok, known as Douyin in mainland China, is a video hosting service.",
    "locality_prompt": "Clifton is located in",
    "locality_ground_truth": "New Jersey",
}

DUNE = {
    "edit": "January 2, 2022 – Abdalla Hamdok resigns as Prime Minister of Sudan",
    "test_inputs": [["Who resigned in Sudan?\\nA) Hamdok\\nB) Kiir", "A"], ["When did he resign?", "January 2"]],
}

ZSRE_DEV = {
    "case_id": 0,
    "prompt": "What university did Watts Humphrey attend?",
    "target_new": "University of Michigan",
    "paraphrase_prompts": "What university did Watts Humphrey take part in?",
    "locality_prompt": "nq question: who played desmond doss",
    "locality_ground_truth": "Hugo Weaving",
}

FORMATS: dict[str, dict[str, Any]] = {
    "ours": FACT,
    "zsre": ZSRE,
    "counterfact": COUNTERFACT,
    "knowedit": KNOWEDIT,
    "hallucination": HALLUCINATION,
    "zsre_dev": ZSRE_DEV,
    "temporal": TEMPORAL,
    "dune": DUNE,
}

REAL_FILES = {
    "zsre_mend_edit": 1037,
    "zsre_dev": 3000,
    "counterfact_dev": 500,
    "knowedit_wiki_counterfact_dev": 700,
    "hallucination_dev": 306,
    "temporal_dev": 75,
}


WITHOUT_REPHRASES = ("hallucination_dev", "knowedit_wiki_counterfact_dev")


def write_records(folder: Path, *records: Any) -> Path:
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_one(folder: Path, record: Any) -> lemoe.Edit:
    (edit,) = lemoe.read_edits(write_records(folder, record))
    return edit


def refusal_message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        lemoe.read_edits(path)
    return str(caught.value)


def test_an_edit_needs_no_more_than_prompt_and_target(tmp_path: Path) -> None:
    edit = read_one(tmp_path, FACT)
    assert (edit.prompt, edit.target, edit.subject) == (FACT["prompt"], "Lyon", None)
    assert edit.rephrases == edit.locality == edit.portability == ()
    assert edit.id


def test_target_new_is_read_as_target(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"prompt": "P is", "target_new": "Q"}).target == "Q"


def test_all_optional_fields_of_our_own_format_are_read(tmp_path: Path) -> None:
    record = {
        **FACT,
        "id": "france",
        "subject": "France",
        "rephrases": ["France's capital is"],
        "locality": [{"prompt": "Hot's opposite is"}, {"prompt": "Berlin is in", "target": "Germany", "kind": "near"}],
        "portability": [{"prompt": "The river in France's capital is", "target": "Rhône"}],
    }
    edit = read_one(tmp_path, record)
    assert (edit.id, edit.subject) == ("france", "France")
    assert edit.rephrases == (lemoe.Probe("France's capital is", "Lyon", "paraphrase"),)
    assert edit.locality == (
        lemoe.Probe("Hot's opposite is", None, "unrelated"),
        lemoe.Probe("Berlin is in", "Germany", "near"),
    )
    assert [(probe.prompt, probe.target) for probe in edit.portability] == [
        ("The river in France's capital is", "Rhône")
    ]


def test_easyedit_zsre_is_read_as_it_is(tmp_path: Path) -> None:
    edit = read_one(tmp_path, ZSRE)
    assert (edit.prompt, edit.target, edit.subject) == (ZSRE["src"], "2006", ZSRE["subject"])
    assert edit.rephrases == (lemoe.Probe(str(ZSRE["rephrase"]), "2006", "paraphrase"),)
    assert edit.locality == (lemoe.Probe(str(ZSRE["loc"]), "The String", "unrelated"),)
    assert [(probe.prompt, probe.target) for probe in edit.portability] == [
        ("What sports event is the challenge of 2006?", "Athletics")
    ]


def test_rome_counterfact_is_read_as_it_is(tmp_path: Path) -> None:
    edit = read_one(tmp_path, COUNTERFACT)
    assert (edit.id, edit.prompt, edit.target, edit.subject) == (
        "4482",
        "Spike Hughes originates from",
        "Philadelphia",
        "Spike Hughes",
    )
    assert [probe.target for probe in edit.rephrases] == ["Philadelphia"] * 2
    assert {(probe.target, probe.kind) for probe in edit.locality} == {("London", "same_template")}
    assert [probe.prompt for probe in edit.locality] == COUNTERFACT["neighborhood_prompts"]


def test_knowedit_groups_are_read_as_kinds_of_probes(tmp_path: Path) -> None:
    edit = read_one(tmp_path, KNOWEDIT)
    assert edit.target == "Franche-Comté"
    assert [(probe.kind, probe.target) for probe in edit.portability] == [
        ("reasoning", "Besançon"),
        ("subject_alias", "Franche-Comté"),
    ]
    assert [(probe.kind, probe.prompt) for probe in edit.locality] == [
        ("same_subject", "The founder of Goursez Vreizh is")
    ]


def test_wise_hallucination_is_read_as_it_is(tmp_path: Path) -> None:
    edit = read_one(tmp_path, HALLUCINATION)
    assert edit.target == HALLUCINATION["target_new"]
    assert edit.locality == (lemoe.Probe("At Creighton, you are part of", "thousands of faculty", "unrelated"),)


def test_wises_out_of_distribution_text_is_split_after_its_first_words(tmp_path: Path) -> None:
    (probe,) = read_one(tmp_path, TEMPORAL).rephrases
    assert (probe.prompt, probe.kind) == ("TikTok, known", "out_of_distribution")
    assert f"{probe.prompt} {probe.target}" == TEMPORAL["ood_rephrase"]


def test_an_out_of_distribution_text_no_longer_than_the_prompt_is_a_paraphrase(tmp_path: Path) -> None:
    edit = read_one(tmp_path, {**TEMPORAL, "ood_rephrase": "TikTok"})
    assert edit.rephrases == (lemoe.Probe("TikTok", edit.target, "paraphrase"),)


def test_a_statement_is_asked_for_by_its_first_half_and_its_questions_are_portability(tmp_path: Path) -> None:
    edit = read_one(tmp_path, DUNE)
    assert edit.prompt == "January 2, 2022 – Abdalla Hamdok"
    assert f"{edit.prompt} {edit.target}" == DUNE["edit"]
    assert [(probe.target, probe.kind) for probe in edit.portability] == [("A", "question"), ("January 2", "question")]


def test_an_equation_is_asked_for_by_its_left_side_and_its_questions_expect_the_right_one(tmp_path: Path) -> None:
    edit = read_one(tmp_path, {"edit": "54 * 76 = 4104", "test_inputs": ["What do 54 shirts at 76 dollars cost?"]})
    assert (edit.prompt, edit.target) == ("54 * 76 =", "4104")
    assert [probe.target for probe in edit.portability] == ["4104"]


def test_dunes_columns_are_one_edit_a_statement(tmp_path: Path) -> None:
    path = tmp_path / "dune.json"
    columns = {
        "edits": ["1 + 2 = 3", "1 + 2 = 3", DUNE["edit"]],
        "test_inputs": ["How many?", "Sum?", [["When?", "Then"]]],
    }
    path.write_text(json.dumps(columns, indent=1))
    edits = lemoe.read_edits(path)
    assert [(edit.target, len(edit.portability)) for edit in edits] == [
        ("3", 2),
        ("resigns as Prime Minister of Sudan", 1),
    ]


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "dune.json"
    path.write_text(json.dumps({"edits": ["1 + 2 = 3"], "test_inputs": []}))
    assert "lists of one length" in refusal_message(path)


def test_counterfacts_generation_prompts_are_kept_once_each(tmp_path: Path) -> None:
    prompt = "Spike Hughes currently lives in"
    assert read_one(tmp_path, {**COUNTERFACT, "generation_prompts": [prompt, prompt]}).generation == (prompt,)
    assert read_one(tmp_path, {**FACT, "generation": [prompt]}).generation == (prompt,)


def test_a_single_paraphrase_may_be_plain_text(tmp_path: Path) -> None:
    edit = read_one(tmp_path, ZSRE_DEV)
    assert [probe.prompt for probe in edit.rephrases] == [ZSRE_DEV["paraphrase_prompts"]]
    assert edit.id == "0"


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_json_array_reads_as_json_lines_do(tmp_path: Path, format_name: str) -> None:
    array = tmp_path / "array.json"
    array.write_text(json.dumps([FORMATS[format_name]], indent=2), encoding="utf-8")
    assert lemoe.read_edits(array) == lemoe.read_edits(write_records(tmp_path, FORMATS[format_name]))


def test_formats_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    assert len(lemoe.read_edits(write_records(tmp_path, *FORMATS.values()))) == len(FORMATS)


@pytest.mark.parametrize("name", REAL_FILES)
def test_published_files_are_read_whole(shared_data: Path, name: str) -> None:
    edits = lemoe.read_edits(shared_data / f"{name}.json")
    assert len(edits) == REAL_FILES[name]
    assert len({edit.id for edit in edits}) == len(edits)
    assert all(edit.prompt.strip() and edit.target.strip() and edit.subject for edit in edits)
    assert sum(len(edit.rephrases) for edit in edits) >= (0 if name in WITHOUT_REPHRASES else len(edits))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("counterfact_dev", "same_template"),
        ("knowedit_wiki_counterfact_dev", "same_subject"),
        ("zsre_mend_edit", "unrelated"),
        ("zsre_dev", "unrelated"),
        ("hallucination_dev", "unrelated"),
        ("temporal_dev", "unrelated"),
    ],
)
def test_published_locality_probes_keep_their_kind(shared_data: Path, name: str, kind: str) -> None:
    edits = lemoe.read_edits(shared_data / f"{name}.json")
    kinds = Counter(probe.kind for edit in edits for probe in edit.locality)
    assert kinds.most_common(1)[0][0] == kind
    assert kinds[kind] >= len(edits) // 2


@pytest.mark.parametrize(
    ("name", "generality", "portability"),
    [
        ("zsre_mend_edit", {"paraphrase"}, {"one_hop"}),
        ("zsre_dev", {"paraphrase"}, set()),
        ("counterfact_dev", {"distracted"}, {"one_hop"}),
        ("knowedit_wiki_counterfact_dev", set(), {"reasoning", "subject_alias", "logical_generalization"}),
        ("hallucination_dev", set(), set()),
        ("temporal_dev", {"out_of_distribution"}, set()),
    ],
)
def test_published_probes_are_told_apart_by_kind(
    shared_data: Path, name: str, generality: set[str], portability: set[str]
) -> None:
    edits = lemoe.read_edits(shared_data / f"{name}.json")
    assert {probe.kind for edit in edits for probe in edit.rephrases} == generality
    assert {probe.kind for edit in edits for probe in edit.portability} == portability


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    assert read_one(tmp_path, {**FACT, "source": {"page": 3}}).extra == {"source": {"page": 3}}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FACT).encode() + b"\r\n\r\n" + json.dumps(ZSRE).encode() + b"\r\n")
    assert [edit.target for edit in lemoe.read_edits(path)] == ["Lyon", "2006"]


def test_line_separators_inside_a_text_do_not_split_it(tmp_path: Path) -> None:
    assert read_one(tmp_path, {**FACT, "prompt": "one\u2028two\x85three"}).prompt == "one\u2028two\x85three"


def test_ids_that_the_file_does_not_give_are_the_same_in_every_run_and_place(tmp_path: Path) -> None:
    other = {"prompt": "The capital of Spain is", "target": "Vigo"}
    first = {edit.prompt: edit.id for edit in lemoe.read_edits(write_records(tmp_path, FACT, other))}
    again = {edit.prompt: edit.id for edit in lemoe.read_edits(write_records(tmp_path, other, FACT))}
    assert first == again
    assert len(set(first.values())) == 2


def test_equal_edits_without_ids_get_different_ids(tmp_path: Path) -> None:
    one, two = lemoe.read_edits(write_records(tmp_path, FACT, FACT))
    assert one.id != two.id


def test_the_digest_covers_what_is_taught_and_not_the_probes(tmp_path: Path) -> None:
    plain = read_one(tmp_path, FACT)
    assert plain.digest == read_one(tmp_path, {**FACT, "id": "x", "rephrases": ["In France?"]}).digest
    assert plain.digest != read_one(tmp_path, {**FACT, "target": "Nice"}).digest


BAD = {
    "no target": ({"prompt": "x"}, "missing `target`"),
    "nothing known": ({"question": "x"}, "missing `prompt` and `target` (the record has: question)"),
    "prompt is a number": ({"prompt": 3, "target": "x"}, "`prompt` must be text, not a number"),
    "target is null": ({"prompt": "x", "target": None}, "`target` must be text, not nothing"),
    "target is blank": ({"prompt": "x", "target": "  "}, "`target` is empty"),
    "subject is a list": ({**FACT, "subject": ["a"]}, "`subject` must be text, not a list"),
    "id is true": ({**FACT, "id": True}, "`id` must be text or a whole number"),
    "rephrases is a number": ({**FACT, "rephrases": 5}, "`rephrases` must be a list, not a number"),
    "probe is a number": ({**FACT, "locality": [5]}, "each entry of `locality` must be text or an object"),
    "probe without prompt": ({**FACT, "locality": [{"target": "x"}]}, "`prompt` must be text"),
    "portability without target": ({**FACT, "portability": ["x"]}, "each entry of `portability` needs a `target`"),
    "half a surrogate": ({**FACT, "target": "\ud800"}, "surrogate"),
    "rewrite is text": ({"requested_rewrite": "x"}, "`requested_rewrite` must be an object, not text"),
    "one-word statement": ({"edit": "x"}, "a statement of one word"),
    "questions are a number": ({"edit": "x y", "test_inputs": 5}, "`test_inputs` must be a list, not a number"),
    "question is a number": ({"edit": "x y", "test_inputs": [5]}, "must be a question or a pair"),
    "not an object": (["x"], "expected a JSON object with `prompt` and `target`, not a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_file_and_line_with_what_was_expected(tmp_path: Path, name: str) -> None:
    record, expected = BAD[name]
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(FACT) + "\n\n" + json.dumps(record) + "\n", encoding="utf-8")
    assert f"{path}:3: " in refusal_message(path)
    assert expected in refusal_message(path)


@pytest.mark.parametrize("field", ["id", "subject"])
def test_half_a_surrogate_pair_is_refused_wherever_it_is_shown_or_written_later(tmp_path: Path, field: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({**FACT, field: "x\ud800"}), encoding="utf-8")
    assert f"{path}:1: " in refusal_message(path)


def test_a_rephrase_without_an_answer_expects_the_edits_own(tmp_path: Path) -> None:
    edit = read_one(tmp_path, {**FACT, "rephrases": [{"prompt": "France's capital is", "target": ""}]})
    assert edit.rephrases[0].target == "Lyon"


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(FACT) + "\n{broken\n", encoding="utf-8")
    assert f"{path}:2: expected one JSON object per line" in refusal_message(path)


def test_all_bad_lines_are_counted_and_the_first_20_listed(tmp_path: Path) -> None:
    path = write_records(tmp_path, *[{"prompt": "x"}] * 23, FACT)
    message = refusal_message(path)
    assert [f"{path}:{number}: " in message for number in range(1, 24)] == [True] * 20 + [False] * 3
    assert "23 bad records" in message
    assert "and 3 more" in message


def test_an_id_used_twice_names_both_places(tmp_path: Path) -> None:
    path = write_records(tmp_path, {**FACT, "id": "a"}, {**ZSRE, "id": "a"})
    assert f"{path}:2: id 'a' is already used at {path}:1" in refusal_message(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_a_file_without_edits_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(content, encoding="utf-8")
    assert f"{path}: no edits in it" in refusal_message(path)


def test_a_broken_json_array_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_text('[{"prompt": "x", "target": "y"},\n{"prompt": ]', encoding="utf-8")
    assert f"{path}:2: not a JSON array" in refusal_message(path)


def test_a_file_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(json.dumps({**FACT, "target": "Orl\u00e9ans"}, ensure_ascii=False).encode("latin-1"))
    assert "not UTF-8 text" in refusal_message(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal_message(tmp_path / "none.jsonl")
    assert "cannot be read" in refusal_message(tmp_path)


@pytest.mark.parametrize("command", ["plan", "edit", "eval"])
def test_bad_edits_end_a_command_with_code_2_and_nothing_written(
    tmp_path: Path, tiny_folder: Any, command: str
) -> None:
    path = write_records(tmp_path, {"prompt": "x"}, FACT)
    result = CliRunner().invoke(cli, [command, str(path), "--model", str(tiny_folder("llama"))])
    assert result.exit_code == 2
    assert f"{path}:1: missing `target`" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [path]


KEYS = st.sampled_from(
    [*{key for record in FORMATS.values() for key in record}, "id", "str", "rephrases", "New Question"]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=12,
)


def mutated_records(record: dict[str, Any]) -> st.SearchStrategy[Any]:
    """A record of a known format in which some values are replaced by anything."""
    return st.dictionaries(st.sampled_from(sorted(record)), JSON, max_size=3).map(lambda other: {**record, **other})


@given(st.lists(JSON | st.one_of(*map(mutated_records, FORMATS.values())), min_size=1, max_size=3))
@settings(max_examples=250, deadline=None)
def test_any_json_on_a_line_gives_edits_or_a_clear_refusal(tmp_path_factory: Any, records: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with suppress(InputError):
        edits = lemoe.read_edits(path)
        assert len({edit.id for edit in edits}) == len(edits) == len(records)
        assert all(edit.prompt.strip() and edit.target.strip() for edit in edits)


@given(st.binary(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_edits_or_a_clear_refusal(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"any\.bin"):
        lemoe.read_edits(path)


def test_a_sample_is_the_same_for_a_seed_and_keeps_the_files_order(tmp_path: Path) -> None:
    edits = lemoe.read_edits(write_records(tmp_path, *({**FACT, "id": number} for number in range(30))))
    drawn = sample_edits(edits, 20, 5, seed=3)
    assert drawn == sample_edits(edits, 20, 5, seed=3) != sample_edits(edits, 20, 5, seed=4)
    assert len(drawn) == 5
    assert drawn == sorted(drawn, key=lambda edit: int(edit.id))
    assert max(int(edit.id) for edit in drawn) < 20
