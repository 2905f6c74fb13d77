"""Compaction: the edits of a round share fewer, smaller experts; what is lost is measured, and too much is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lemoe
from lemoe.adaptor.merging import merge_adaptors, merge_in_memory
from lemoe.errors import AdaptorError, LemoeError
from lemoe.runs import compaction
from lemoe.runs.compaction import CompactionResult, compact_adaptor
from lemoe_cli.main import cli

SettingsOf = Callable[..., lemoe.Settings]
ANY_DROP = 1.0


@pytest.fixture(scope="module", autouse=True)
def one_size() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "NEURONS_PER_EDIT", (2.0,))
        yield


@pytest.fixture(scope="module")
def whole(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf) -> lemoe.AdaptorState:
    """Two rounds of three edits with an expert each."""
    few = anchor(steps=6, variants=1)
    return lemoe.stack([lemoe.train_round(base, facts[:3], few), lemoe.train_round(base, facts[3:], few)])


@pytest.fixture(scope="module")
def halved(base: lemoe.BaseModel, whole: lemoe.AdaptorState) -> CompactionResult:
    """The same edits compacted, two edits per expert, with two neurons per edit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "EDITS_PER_EXPERT", 2)
        return compact_adaptor(base, whole, tolerance=ANY_DROP)


@pytest.fixture
def shared(halved: CompactionResult) -> lemoe.AdaptorState:
    assert halved.state is not None
    return halved.state


def routed_experts(base: lemoe.BaseModel, state: lemoe.AdaptorState, edits: list[lemoe.Edit]) -> list[int]:
    with lemoe.insert(base, state) as inserted:
        prompts = [base.tokenizer(edit.prompt).input_ids for edit in edits]
        return [route.expert for route in inserted.explain(prompts)]


def test_edits_of_a_round_share_fewer_experts_with_fewer_neurons(
    whole: lemoe.AdaptorState, halved: CompactionResult, shared: lemoe.AdaptorState
) -> None:
    assert [[edit.id for edit in edits] for edits in shared.edits_by_expert] == [
        ["fact-0", "fact-1"],
        ["fact-2"],
        ["fact-3", "fact-4"],
        ["fact-5"],
    ]
    assert shared.experts.nbytes < whole.experts.nbytes == halved.size
    assert halved.trials[-1].size == shared.experts.nbytes
    assert shared.edits == whole.edits


def test_each_edit_reaches_its_expert_and_the_evaluation_says_so(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], shared: lemoe.AdaptorState
) -> None:
    assert routed_experts(base, shared, facts) == [0, 0, 1, 2, 2, 3]
    result = lemoe.evaluate(base, shared, facts)
    assert result.value("routing", "agreement") == 1.0
    assert [record.nearest for record in result.records] == [edit.id for edit in facts]
    assert result.value("reliability") > result.value("reliability", stage="before")


def test_the_reported_quality_is_what_evaluation_measures(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], whole: lemoe.AdaptorState, halved: CompactionResult
) -> None:
    assert halved.before.reliability == lemoe.evaluate(base, whole, facts).value("reliability", "exact_match")
    assert halved.state is not None
    after = lemoe.evaluate(base, halved.state, facts).value("reliability", "exact_match")
    assert halved.trials[-1].quality.reliability == after


def test_a_compacted_adaptor_survives_its_file(shared: lemoe.AdaptorState, tmp_path: Path) -> None:
    lemoe.save_adaptor(shared, tmp_path / "shared")
    read = lemoe.load_adaptor(tmp_path / "shared")
    assert read == shared
    assert read.edits_by_expert == shared.edits_by_expert


def test_compacting_twice_gives_the_same_tensors(
    base: lemoe.BaseModel, whole: lemoe.AdaptorState, shared: lemoe.AdaptorState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "EDITS_PER_EXPERT", 2)
    again = compact_adaptor(base, whole, tolerance=ANY_DROP).state
    assert again is not None
    assert again == shared


def test_compacted_and_ordinary_rounds_stack_and_each_answers_as_before(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    whole: lemoe.AdaptorState,
    shared: lemoe.AdaptorState,
    tmp_path: Path,
) -> None:
    lemoe.save_adaptor(shared.select_rounds([0]), tmp_path / "shared")
    lemoe.save_adaptor(whole.select_rounds([1]), tmp_path / "whole")
    merge_adaptors([tmp_path / "shared", tmp_path / "whole"], tmp_path / "both")
    both = lemoe.load_adaptor(tmp_path / "both")
    assert routed_experts(base, both, facts) == [0, 0, 1, 2, 3, 4]
    for state, edit in ((shared, facts[1]), (whole, facts[4])):
        ids = torch.tensor([base.tokenizer(edit.prompt).input_ids])
        with lemoe.insert(base, state):
            expected = base.model(ids).logits
        with lemoe.insert(base, both):
            assert torch.equal(base.model(ids).logits, expected)


def test_a_round_and_its_compacted_form_are_not_stacked(whole: lemoe.AdaptorState, shared: lemoe.AdaptorState) -> None:
    assert not {record.id for record in whole.rounds} & {record.id for record in shared.rounds}
    for pair in ((whole, shared), (shared, whole)):
        with pytest.raises(AdaptorError, match="hold the same edits, one of them compacted; leave one out"):
            lemoe.stack(pair)
    assert len(lemoe.stack([shared, shared]).rounds) == 2


def test_an_edit_that_shares_its_expert_is_not_dropped_but_its_round_is(
    whole: lemoe.AdaptorState, shared: lemoe.AdaptorState, tmp_path: Path
) -> None:
    lemoe.save_adaptor(shared, tmp_path / "shared")
    with pytest.raises(AdaptorError, match=r"edit fact-0 \(.* -> Rome\) shares an expert with 1 other edits; drop"):
        merge_adaptors([tmp_path / "shared"], tmp_path / "out", drop=["fact-0"])
    merge_adaptors([tmp_path / "shared"], tmp_path / "alone", drop=["fact-2"])
    assert [len(edits) for edits in lemoe.load_adaptor(tmp_path / "alone").edits_by_expert] == [2, 2, 1]
    dropped = merge_adaptors([tmp_path / "shared"], tmp_path / "out", drop=["1"])
    assert [edit.id for edit in dropped.dropped] == ["fact-0", "fact-1", "fact-2"]
    assert lemoe.load_adaptor(tmp_path / "out") == shared.select_rounds([1])


def test_a_later_edit_supersedes_one_that_shares_its_expert(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, shared: lemoe.AdaptorState, tmp_path: Path
) -> None:
    newer = lemoe.train_round(base, [replace(facts[1], id="newer", target="Bergen")], anchor())
    both = lemoe.stack([shared, newer])
    assert [(old.id, new.id) for old, new in both.superseded_edits] == [("fact-1", "newer")]
    assert facts[1].digest not in both.answering_digests
    assert facts[0].digest in both.answering_digests
    assert routed_experts(base, both, facts[:2]) == [0, 4]
    lemoe.save_adaptor(newer, tmp_path / "newer")
    lemoe.save_adaptor(shared, tmp_path / "shared")
    with pytest.raises(AdaptorError, match=r"edit fact-1 \(.*\) is superseded by newer \(.* -> Bergen\)"):
        merge_adaptors([tmp_path / "shared", tmp_path / "newer"], None, on_conflict="error")
    with pytest.raises(AdaptorError, match=r"edit fact-1 \(.*\) shares an expert"):
        merge_adaptors([tmp_path / "newer", tmp_path / "shared"], None, on_conflict="keep")


def test_superseded_edits_are_left_out_of_a_compacted_adaptor(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, whole: lemoe.AdaptorState
) -> None:
    newer = lemoe.train_round(base, [replace(facts[0], id="newer", target="Bergen"), facts[1]], anchor())
    outcome = compact_adaptor(base, lemoe.stack([whole.select_rounds([0]), newer]), tolerance=ANY_DROP)
    assert outcome.left_out == 2
    assert outcome.state is not None
    assert [edit.id for edit in outcome.state.edits] == ["fact-2", "newer", "fact-1"]


def test_the_smallest_size_within_the_tolerance_is_kept(
    base: lemoe.BaseModel, whole: lemoe.AdaptorState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "NEURONS_PER_EDIT", (3.0, 2.0, 1.0, 0.5))
    losses = iter([0.0, 0.01, 0.02, 0.0])
    monkeypatch.setattr(compaction.Quality, "largest_drop", lambda before, after: next(losses))
    outcome = compact_adaptor(base, whole, tolerance=0.01)
    assert [trial.neurons for trial in outcome.trials] == list(compaction.NEURONS_PER_EDIT[:3])
    assert outcome.state is not None
    assert outcome.state.experts.nbytes == outcome.trials[1].size


def test_half_bytes_are_compacted_to_half_bytes(
    whole: lemoe.AdaptorState, base: lemoe.BaseModel, tmp_path: Path
) -> None:
    lemoe.save_adaptor(whole, tmp_path / "whole")
    read = merge_in_memory([tmp_path / "whole"], dtype="bfloat16").state
    assert torch.equal(read.experts.up, whole.experts.up.bfloat16())
    outcome = compact_adaptor(base, read, tolerance=ANY_DROP)
    assert outcome.state is not None
    assert outcome.state.experts.up.dtype == torch.bfloat16


def test_what_cannot_be_compacted_is_refused(
    base: lemoe.BaseModel, trained: lemoe.AdaptorState, shared: lemoe.AdaptorState, tiny: Callable[..., lemoe.BaseModel]
) -> None:
    with pytest.raises(AdaptorError, match="only experts of method `anchor` can be compacted, not `paper`"):
        compact_adaptor(base, trained)
    with pytest.raises(AdaptorError, match="made for another base"):
        compact_adaptor(tiny("gpt2"), shared)
    with pytest.raises(AdaptorError, match="nothing to compact"):
        compact_adaptor(base, shared.select_rounds([1]).drop_experts([0]))


@pytest.mark.parametrize("experts", [0, -1, 3, 2**40, 1.5, True, "2", None])
def test_records_with_an_impossible_number_of_experts_are_refused(
    shared: lemoe.AdaptorState, tmp_path: Path, experts: object
) -> None:
    wrong = replace(shared.rounds[0], experts=experts)  # type: ignore[arg-type]
    lemoe.save_adaptor(replace(shared, rounds=(wrong, shared.rounds[1])), tmp_path / "wrong")
    with pytest.raises(LemoeError):
        lemoe.load_adaptor(tmp_path / "wrong")


def run_compact(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["compact", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_reports_and_writes_or_refuses_and_writes_nothing(
    tiny_folder: Callable[[str], Path],
    whole: lemoe.AdaptorState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lemoe.save_adaptor(whole, tmp_path / "whole")
    model, output = tiny_folder("llama"), tmp_path / "out"
    arguments = (tmp_path / "whole", "--model", model, "--device", "cpu", "-o", output)
    code, text = run_compact(*arguments, "--tolerance", 1)
    assert (code, output.exists()) == (0, True)
    assert all(word in text for word in ("as it is", "2 neurons per edit", "reliability", "generality", "locality"))
    output.unlink()
    monkeypatch.setattr(compaction.Quality, "largest_drop", lambda before, after: 0.02)
    code, text = run_compact(*arguments)
    assert (code, output.exists()) == (1, False)
    assert "nothing is written: more than --tolerance 0.01 would be lost" in text


def test_a_compaction_needs_somewhere_to_write(whole: lemoe.AdaptorState, tmp_path: Path) -> None:
    lemoe.save_adaptor(whole, tmp_path / "whole")
    code, text = run_compact(tmp_path / "whole", "--model", "llama")
    assert (code, "give the result's file with --output" in text) == (2, True)
    code, text = run_compact(tmp_path / "whole", "--model", "no-such-model", "-o", tmp_path / "whole")
    assert (code, "whole exists" in text) == (2, True)
