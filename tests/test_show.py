"""`lemoe show`: what an adaptor holds, shown without trusting it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import lemoe_command, refused_message

import lemoe
from lemoe.data.edits import combine_digests

SettingsOf = Callable[..., lemoe.Settings]

HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]\u202e../../etc/passwd"


@pytest.fixture
def state(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf) -> lemoe.AdaptorState:
    """Two rounds, the second of which answers a question of the first anew."""
    anew = replace(facts[0], id="anew", target="elsewhere")
    return lemoe.stack([lemoe.train_round(base, edits, anchor()) for edits in (facts[:2], [anew])])


@pytest.fixture
def file(state: lemoe.AdaptorState, tmp_path: Path) -> Path:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(state, path)
    return path


def test_show_tells_base_rounds_edits_and_supersessions(file: Path, state: lemoe.AdaptorState) -> None:
    result = lemoe_command("show", file, "--edits")
    assert result.exit_code == 0
    for part in ("LlamaForCausalLM", "3 in 2 rounds, 1 superseded", state.rounds[0].id[:12], "fact-0", "anew"):
        assert part in result.stdout
    assert lemoe_command("show", file.parent, "--edits").stdout == result.stdout


def remove_spaces(text: str) -> str:
    """The text of a table, wherever its cells break."""
    return "".join(text.split())


def test_edits_are_shown_with_what_they_teach_without_a_model(file: Path, facts: list[lemoe.Edit]) -> None:
    before, _, listed = lemoe_command("show", file, "--edits").stdout.rpartition("Edits")
    expected = [(f"1/{edit.id}", edit.prompt, edit.target) for edit in facts[:2]]
    expected += [("2/anew", facts[0].prompt, "elsewhere")]
    assert remove_spaces(listed) == "round/editprompttarget" + "".join(
        remove_spaces("".join(cells)) for cells in expected
    )
    superseded = before.partition("Superseded")[2]
    assert all(text in superseded for text in ("1/fact-0", "Eiffel Tower", "Rome", "2/anew", "elsewhere"))


def test_edits_whose_prompt_was_not_answered_are_named(state: lemoe.AdaptorState, tmp_path: Path) -> None:
    path = tmp_path / "missed.safetensors"
    missed = replace(state.rounds[0], missed=("fact-1",))
    lemoe.save_adaptor(replace(state, rounds=(missed, state.rounds[1])), path)
    shown = lemoe_command("show", path).stdout
    assert "Missed when their round ended" in shown
    assert "1/fact-1" in shown
    assert "white" in shown


def test_a_file_without_texts_is_shown_with_those_that_the_models_tokenizer_gives(
    state: lemoe.AdaptorState, facts: list[lemoe.Edit], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "old.safetensors"
    lemoe.save_adaptor(replace(state, rounds=tuple(replace(r, prompts=(), targets=()) for r in state.rounds)), path)
    assert "stands" not in lemoe_command("show", path, "--edits").stdout
    shown = lemoe_command("show", path, "--json", "--model", tiny_folder("llama"), "--device", "cpu").stdout
    rounds = json.loads(shown)["rounds"]
    assert rounds[0]["prompts"] == [edit.prompt for edit in facts[:2]]
    assert rounds[1]["targets"] == ["elsewhere"]


def test_texts_that_are_not_what_an_edit_teaches_are_found(
    state: lemoe.AdaptorState, facts: list[lemoe.Edit], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "lies.safetensors"
    lies = replace(state.rounds[0], targets=("Rome", "brass"))
    lemoe.save_adaptor(replace(state, rounds=(lies, state.rounds[1])), path)
    assert "fact-1 (The Eiffel Tower is made of -> brass): its text is not what" in refused_message(
        "show", path, "--verify"
    )
    digests = (lies.edits[0], replace(facts[1], target="brass").digest)
    lies = replace(lies, edits=digests, edits_sha256=combine_digests(digests))
    lemoe.save_adaptor(replace(state, rounds=(lies, state.rounds[1])), path, overwrite=True)
    assert lemoe_command("show", path, "--verify").exit_code == 0
    said = refused_message("show", path, "--model", tiny_folder("llama"), "--device", "cpu")
    assert "fact-1 (The Eiffel Tower is made of -> brass): its text is not what its anchor holds" in said


def test_a_changed_byte_is_found(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last byte of the last anchor's subject
    file.write_bytes(content)
    assert "it is not as it was written" in refused_message("show", file)


def test_show_as_json_holds_everything_and_is_checked(file: Path, state: lemoe.AdaptorState) -> None:
    shown = json.loads(lemoe_command("show", file, "--json", "--verify").stdout)
    assert shown["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert shown["size"] == file.stat().st_size
    assert [record["id"] for record in shown["rounds"]] == [record.id for record in state.rounds]
    assert shown["superseded"] == [{"edit": "fact-0", "round": 1, "by": "anew", "by_round": 2}]
    assert shown["rounds"][1]["prompts"] == [state.edits[2].prompt]
    assert len(shown["checked"]) == 3


def test_verify_with_a_model_tells_whether_it_is_the_adaptors(file: Path, tiny_folder: Callable[[str], Path]) -> None:
    right = lemoe_command("show", file, "--model", tiny_folder("llama"), "--device", "cpu")
    assert right.exit_code == 0
    assert "edited FFN and tokenizer are the same" in right.stderr
    assert "made for another base model" in refused_message(
        "show", file, "--model", tiny_folder("mistral"), "--device", "cpu"
    )


def test_records_that_contradict_themselves_are_found(state: lemoe.AdaptorState, tmp_path: Path) -> None:
    first = replace(state.rounds[0], edits=state.rounds[0].edits[::-1])
    path = tmp_path / "bent.safetensors"
    lemoe.save_adaptor(replace(state, rounds=(first, state.rounds[1])), path)
    assert lemoe_command("show", path).exit_code == 0
    assert "round 1: the digests of its edits do not give its hash" in refused_message("show", path, "--verify")


def test_values_that_are_not_finite_are_never_shown_as_fine(state: lemoe.AdaptorState, tmp_path: Path) -> None:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(state, path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    tensors["experts.up"][0, 0] = torch.nan
    save_file(tensors, path, metadata)
    assert "experts.up: holds values that are not finite" in refused_message("show", path)


def test_names_from_a_file_cannot_drive_the_terminal(state: lemoe.AdaptorState, tmp_path: Path) -> None:
    hostile = replace(state.rounds[0], ids=(HOSTILE, "fact-1"), targets=(HOSTILE, HOSTILE))
    bent = replace(state, base=replace(state.base, name=HOSTILE), rounds=(hostile, state.rounds[1]))
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(bent, path)
    for arguments in (["--edits"], ["--json"]):
        said = lemoe_command("show", path, *arguments)
        assert said.exit_code == 0
        assert not {"\x1b", "\x07", "\u202e"} & set(said.output)
    assert "[red]" in lemoe_command("show", path, "--edits").stdout
