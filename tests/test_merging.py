"""Merging adaptor files: stacking, taking out, conflicts; experts are copied from file to file, never trained again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lemoe
from lemoe.adaptor.checkpoint import AdaptorFile
from lemoe.adaptor.merging import merge_adaptors
from lemoe.data.edits import digest_edits
from lemoe.errors import AdaptorError, InputError, OutputError

SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture
def files(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> list[Path]:
    """Three adaptors of one round each, of two edits each."""
    paths = []
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        lemoe.save_adaptor(lemoe.train_round(base, facts[2 * number : 2 * number + 2], anchor()), path)
        paths.append(path)
    return paths


def merged_bytes(paths: list[Path], output: Path, **options: object) -> bytes:
    merge_adaptors(paths, output, **options)  # type: ignore[arg-type]
    return output.read_bytes()


def test_copying_experts_from_file_to_file_gives_what_stacking_in_memory_gives(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lemoe.save_adaptor(lemoe.stack([lemoe.load_adaptor(path) for path in files]), tmp_path / "memory")
    for size in (1, 300, 1 << 20):  # one row at a time, an expert and a half, all
        monkeypatch.setattr("lemoe.adaptor.merging.CHUNK_BYTES", size)
        assert merged_bytes(files, tmp_path / f"copied-{size}") == (tmp_path / "memory").read_bytes()


@pytest.mark.parametrize("by", ["2", "round:2", "id", "edits"])
def test_a_dropped_round_was_never_there(files: list[Path], tmp_path: Path, by: str) -> None:
    all_three = tmp_path / "all"
    merge_adaptors(files, all_three)
    names = {"id": [lemoe.load_adaptor(files[1]).rounds[0].id[:12]], "edits": ["fact-2", "edit:fact-3"]}
    dropped = merged_bytes([all_three], tmp_path / "dropped", drop=names.get(by, [by]))
    assert dropped == merged_bytes([files[0], files[2]], tmp_path / "never")


def test_a_dropped_edit_was_never_there_and_its_prompt_has_the_bases_answer_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], files: list[Path], tmp_path: Path
) -> None:
    merged = merge_adaptors(files, tmp_path / "dropped", drop=["fact-2"])
    assert [edit.id for edit in merged.dropped] == ["fact-2"]
    state, whole = lemoe.load_adaptor(tmp_path / "dropped"), lemoe.stack([lemoe.load_adaptor(path) for path in files])
    kept = [0, 1, 3, 4, 5]
    assert state.experts == whole.experts.select(kept)
    assert state.router == whole.router.select(kept)
    assert [record.ids for record in state.rounds] == [("fact-0", "fact-1"), ("fact-3",), ("fact-4", "fact-5")]
    assert state.rounds[1].dropped == (facts[2].digest,)
    assert state.rounds[1].edits == (facts[3].digest,)
    assert state.rounds[1].edits_sha256 == digest_edits([facts[3]])
    ids = torch.tensor([base.tokenizer(facts[2].prompt).input_ids])
    expected = base.model(ids).logits
    with lemoe.insert(base, whole):
        assert not torch.equal(base.model(ids).logits, expected)
    with lemoe.insert(base, state):
        assert torch.equal(base.model(ids).logits, expected)


def test_dropping_at_once_and_one_after_another_give_one_file(files: list[Path], tmp_path: Path) -> None:
    once = merged_bytes(files, tmp_path / "once", drop=["fact-1", "fact-2", "fact-4"])
    merge_adaptors(files, tmp_path / "step", drop=["fact-4"])
    merge_adaptors([tmp_path / "step"], tmp_path / "step2", drop=["fact-2"])
    assert merged_bytes([tmp_path / "step2"], tmp_path / "steps", drop=["fact-1"]) == once


def test_dropping_the_latest_edit_lets_the_one_before_answer_again(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, files: list[Path], tmp_path: Path
) -> None:
    newer = lemoe.train_round(base, [replace(facts[0], id="newer", target="Bergen")], anchor())
    lemoe.save_adaptor(newer, tmp_path / "newer")
    assert merge_adaptors([files[0], tmp_path / "newer"], None).state.superseded_edits
    undone = merged_bytes([files[0], tmp_path / "newer"], tmp_path / "undone", drop=["newer"])
    assert undone == files[0].read_bytes()


def test_a_dropped_edit_is_no_more_among_those_that_missed_their_target(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    state = lemoe.train_round(base, facts[:2], anchor(loss_target=0.0, steps=3, retries=0))
    lemoe.save_adaptor(state, tmp_path / "both")
    (record,) = merge_adaptors([tmp_path / "both"], None, drop=["fact-0"]).state.rounds
    assert state.rounds[0].missed == ("fact-0", "fact-1")
    assert record.missed == ("fact-1",)
    assert record.routed <= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("4", "no such round"),
        ("0", "no such round"),
        ("fact-9", "no such edit"),
        ("round:fact-1", "no such round"),
        ("edit:1", "no such edit"),
        ("../../etc", "no such edit"),
    ],
)
def test_what_is_not_there_cannot_be_dropped(files: list[Path], tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_adaptors(files, tmp_path / "out", drop=[name])
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_a_round_and_an_edit_must_say_which(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    edits = [replace(facts[0], id="1"), replace(facts[1], id="2")]
    lemoe.save_adaptor(lemoe.train_round(base, edits, anchor()), tmp_path / "a")
    with pytest.raises(InputError, match="round:1 or edit:1"):
        merge_adaptors([tmp_path / "a"], None, drop=["1"])
    assert merge_adaptors([tmp_path / "a"], None, drop=["edit:1"]).state.rounds[0].ids == ("2",)


@pytest.fixture
def twice(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> list[Path]:
    """Two adaptors in which the id `e1` stands for two answers to one question; the second has another edit too."""
    paths = [tmp_path / "one", tmp_path / "two"]
    first, second = replace(facts[0], id="e1"), replace(facts[0], id="e1", target="Bergen")
    for path, edits in zip(paths, ([first, facts[3]], [second, facts[4]]), strict=True):
        lemoe.save_adaptor(lemoe.train_round(base, edits, anchor()), path)
    return paths


def test_an_id_of_several_edits_must_say_which_and_the_message_tells_how(
    facts: list[lemoe.Edit], twice: list[Path], tmp_path: Path
) -> None:
    for name in ("e1", "edit:e1"):
        with pytest.raises(InputError) as refused:
            merge_adaptors(twice, tmp_path / "out", drop=[name])
        assert str(refused.value).splitlines() == [
            f"`drop` {name}: 2 edits have this name; say which, or name each:",
            f"  edit:1/e1 is e1 ({facts[0].prompt} -> Rome)",
            f"  edit:2/e1 is e1 ({facts[0].prompt} -> Bergen)",
        ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by", ["2/e1", "edit:2/e1", "round", "digest", "digest in its round"])
def test_one_of_several_edits_of_an_id_is_dropped_alone(
    facts: list[lemoe.Edit], twice: list[Path], tmp_path: Path, by: str
) -> None:
    digest = replace(facts[0], target="Bergen").digest
    names = {
        "round": f"{lemoe.load_adaptor(twice[1]).rounds[0].id[:12]}/e1",
        "digest": digest[:12],
        "digest in its round": f"2/{digest[:6]}",
    }
    merged = merge_adaptors(twice, tmp_path / "out", drop=[names.get(by, by)])
    assert [(edit.round, edit.id, edit.target) for edit in merged.dropped] == [(2, "e1", "Bergen")]
    assert [record.ids for record in merged.state.rounds] == [("e1", "fact-3"), ("fact-4",)]
    assert merge_adaptors(twice, None, drop=["1/e1", "2/e1"]).state.rounds[0].ids == ("fact-3",)


def test_two_edits_of_one_id_in_one_round_are_told_apart_by_their_digests(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path
) -> None:
    edits = [replace(edit, id="a/b") for edit in facts[:2]] + [facts[2]]
    lemoe.save_adaptor(lemoe.train_round(base, edits, anchor()), tmp_path / "a")
    with pytest.raises(InputError, match=f"edit:1/{edits[1].digest[:12]} is a/b") as refused:
        merge_adaptors([tmp_path / "a"], None, drop=["a/b"])
    assert f"edit:1/{edits[0].digest[:12]}" in str(refused.value)
    dropped = merge_adaptors([tmp_path / "a"], None, drop=[f"edit:1/{edits[1].digest[:12]}"])
    assert dropped.state.rounds[0].edits == (edits[0].digest, edits[2].digest)


def test_a_dropped_edit_leaves_no_text_in_the_file(files: list[Path], facts: list[lemoe.Edit], tmp_path: Path) -> None:
    assert facts[2].prompt.encode() in merged_bytes(files, tmp_path / "whole")
    dropped = merged_bytes(files, tmp_path / "out", drop=["fact-2"])
    assert facts[2].prompt.encode() not in dropped
    assert all(facts[index].prompt.encode() in dropped for index in (0, 1, 3, 4, 5))


def test_an_adaptor_is_not_emptied(files: list[Path]) -> None:
    with pytest.raises(AdaptorError, match="nothing would be left"):
        merge_adaptors(files[:1], None, drop=["1"])


def test_rounds_that_others_were_trained_beside_and_edits_that_share_an_expert_stay(
    trained: lemoe.AdaptorState, tmp_path: Path
) -> None:
    lemoe.save_adaptor(trained, tmp_path / "paper")
    with pytest.raises(AdaptorError, match="trained beside a round that would be dropped"):
        merge_adaptors([tmp_path / "paper"], None, drop=["1"])
    with pytest.raises(AdaptorError, match="shares an expert with 1 other"):
        merge_adaptors([tmp_path / "paper"], None, drop=["fact-3"])
    last = merged_bytes([tmp_path / "paper"], tmp_path / "first", drop=["2"])
    lemoe.save_adaptor(trained.select_rounds([0]), tmp_path / "alone")
    assert last == (tmp_path / "alone").read_bytes()


def test_a_round_that_is_there_whole_and_without_an_edit_is_refused(files: list[Path], tmp_path: Path) -> None:
    merge_adaptors(files[:1], tmp_path / "less", drop=["fact-1"])
    with pytest.raises(AdaptorError, match="comes twice, without 1 of its edits and without 0"):
        merge_adaptors([files[0], tmp_path / "less"], None)
    assert merge_adaptors([tmp_path / "less", tmp_path / "less"], None).repeated_rounds == 1


def test_conflicts_latest_error_keep(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, files: list[Path], tmp_path: Path
) -> None:
    newer = lemoe.train_round(base, [replace(facts[0], id="newer", target="Bergen"), facts[4]], anchor())
    lemoe.save_adaptor(newer, tmp_path / "new")
    paths = [files[0], tmp_path / "new"]
    with pytest.raises(AdaptorError, match=r"edit fact-0 \(.* -> Rome\) is superseded by newer \(.* -> Bergen\)"):
        merge_adaptors(paths, tmp_path / "strict", on_conflict="error")
    assert not (tmp_path / "strict").exists()
    merged = merge_adaptors(paths, tmp_path / "latest")
    assert [(earlier.id, later.id) for earlier, later in merged.state.superseded_edits] == [("fact-0", "newer")]
    again = merge_adaptors([tmp_path / "latest", files[0]], tmp_path / "again", on_conflict="error")
    assert again.state.superseded_edits == merged.state.superseded_edits
    kept = merge_adaptors(paths, tmp_path / "keep", on_conflict="keep")
    assert [(later.id, earlier.id) for later, earlier in kept.kept_out] == [("newer", "fact-0")]
    assert [record.ids for record in kept.state.rounds] == [("fact-0", "fact-1"), ("fact-4",)]
    assert not lemoe.load_adaptor(tmp_path / "keep").superseded_edits


def test_experts_may_be_stored_in_half_the_bytes(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], files: list[Path], tmp_path: Path
) -> None:
    merge_adaptors(files, tmp_path / "whole")
    merge_adaptors(files, tmp_path / "half", dtype="bfloat16")
    whole, half = lemoe.load_adaptor(tmp_path / "whole"), lemoe.load_adaptor(tmp_path / "half")
    assert half.experts.up.dtype == torch.bfloat16
    assert torch.equal(half.experts.down, whole.experts.down.bfloat16())
    assert merged_bytes([tmp_path / "half"], tmp_path / "again") == (tmp_path / "half").read_bytes()
    ids = torch.tensor([base.tokenizer(facts[2].prompt).input_ids])
    answers = []
    for state in (whole, half):
        with lemoe.insert(base, state):
            answers.append(base.model(ids).logits)
    torch.testing.assert_close(*answers, atol=0.2, rtol=0.05)


def test_values_too_large_for_a_type_are_not_stored_in_it(files: list[Path], tmp_path: Path) -> None:
    state = lemoe.load_adaptor(files[0])
    lemoe.save_adaptor(replace(state, experts=replace(state.experts, up=state.experts.up * 1e8)), tmp_path / "large")
    with pytest.raises(AdaptorError, match="too large for float16"):
        merge_adaptors([tmp_path / "large"], tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_without_an_output_and_over_an_existing_file_nothing_is_written(files: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    merged = merge_adaptors(files, None)
    assert (len(merged.state.rounds), merged.size) == (3, 0)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(OutputError, match="exists"):
        merge_adaptors(files, files[0])


def test_an_opened_file_reads_experts_only_when_asked(files: list[Path]) -> None:
    file, state = AdaptorFile(files[0]), lemoe.load_adaptor(files[0])
    assert file.state.experts.up.is_meta
    assert file.state.rounds == state.rounds
    assert torch.equal(file.read_rows("experts.down", 4, 8), state.experts.down[4:8])
    assert file.load() == state
