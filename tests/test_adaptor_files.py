"""Adaptor files: everything that is refused, and stacking rounds that were trained separately."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_contracts import get_key_router
from torch import Tensor

import lemoe
from lemoe.adaptor.merging import merge_adaptors
from lemoe.errors import AdaptorError, OutputError

pytestmark = pytest.mark.versions

SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture
def path(trained: lemoe.AdaptorState, tmp_path: Path) -> Path:
    """The file of a valid adaptor of two rounds."""
    file = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(trained, file)
    return file


def read_contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["lemoe"])  # noqa: SIM118


def refuse_file(path: Path) -> str:
    with pytest.raises(AdaptorError) as caught:
        lemoe.load_adaptor(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def refuse_with_tensors(path: Path, changes: dict[str, Tensor | None]) -> str:
    """Why the file is refused once the named tensors are replaced (None: removed)."""
    tensors, header = read_contents(path)
    changed = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file(changed, path, {"lemoe": json.dumps(header)})
    return refuse_file(path)


def refuse_with_header(path: Path, **changes: Any) -> str:
    """Why the file is refused once the metadata is changed."""
    tensors, header = read_contents(path)
    save_file(tensors, path, {"lemoe": json.dumps({**header, **changes})})
    return refuse_file(path)


def test_a_file_holds_one_metadata_key_with_sorted_json_and_no_text_of_the_edits(
    path: Path, facts: list[lemoe.Edit]
) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["lemoe"]
    header = json.loads(metadata["lemoe"])
    assert metadata["lemoe"] == json.dumps(header, sort_keys=True)
    assert {"format", "tool", "base", "settings", "rounds"} <= set(header)
    assert not any(edit.prompt.encode() in path.read_bytes() for edit in facts)


def test_one_expert_can_be_read_without_the_others(path: Path, trained: lemoe.AdaptorState) -> None:
    with safe_open(path, framework="pt") as file:
        start, end = file.get_tensor("experts.offsets")[1:3].tolist()
        rows = file.get_slice("experts.up")[start:end]
    assert torch.equal(rows, trained.experts.select([1]).up)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refuse_file(tmp_path / "none.safetensors")
    assert "no such file" in refuse_file(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "not a whole safetensors file" in refuse_file(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("These are notes, and long enough to hold a header length.")
    assert "not a whole safetensors file" in refuse_file(path)


def test_a_safetensors_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"lora_A": torch.zeros(2)}, path, {"format": "pt"})
    assert "not a lemoe adaptor" in refuse_file(path)


def test_a_newer_format_says_to_update(path: Path) -> None:
    assert "Update lemoe" in refuse_with_header(path, format=999)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": None},
        {"rounds": [{"id": "x"}]},
        {"rounds": []},
        {"base": {}},
        {"base": "llama"},
        {"settings": []},
        {"settings": {"lerning_rate": 1}},
    ],
)
def test_damaged_metadata_is_refused(path: Path, changes: dict[str, Any]) -> None:
    refuse_with_header(path, **changes)


def test_metadata_that_is_not_json_is_refused(path: Path) -> None:
    tensors, _ = read_contents(path)
    save_file(tensors, path, {"lemoe": "{"})
    assert "metadata is damaged" in refuse_file(path)


def test_missing_extra_misshaped_and_non_finite_tensors_are_all_listed(path: Path) -> None:
    message = refuse_with_tensors(
        path,
        {
            "experts.gate": None,
            "stray": torch.zeros(1),
            "router.keys": torch.zeros(2, 5),
            "experts.scale": torch.tensor([1.0, torch.nan]),
        },
    )
    assert "experts.gate: missing" in message
    assert "stray: not expected" in message
    assert "router.keys: shape [2, 5], expected [2, 16]" in message
    assert "experts.scale: holds values that are not finite" in message
    assert "experts.up" not in message


@pytest.mark.parametrize(
    "offsets",
    [
        torch.tensor([0, 16, 8]),
        torch.tensor([4, 8, 16]),
        torch.tensor([0.0, 8.0, 16.0]),
        torch.tensor([[0, 8], [8, 16]]),
        torch.tensor(16),
        torch.tensor([0, 8, 2**40]),
        torch.zeros(0, dtype=torch.long),
    ],
    ids=["descending", "late start", "float", "two-dimensional", "scalar", "beyond the end", "empty"],
)
def test_offsets_that_do_not_cut_the_experts_apart_are_refused(path: Path, offsets: Tensor) -> None:
    assert "experts.offsets" in refuse_with_tensors(path, {"experts.offsets": offsets}) or "experts.up" in refuse_file(
        path
    )


def test_a_missing_tensor_does_not_make_others_look_wrong(path: Path) -> None:
    message = refuse_with_tensors(path, {"experts.offsets": None})
    assert "experts.offsets: missing" in message
    assert "experts.up" not in message


def test_a_lineage_that_points_nowhere_is_refused(path: Path) -> None:
    assert "router.lineage" in refuse_with_tensors(path, {"router.lineage": torch.tensor([0, 7])})


def test_tensors_of_the_wrong_type_are_refused(path: Path, trained: lemoe.AdaptorState) -> None:
    assert "experts.up: type torch.int64" in refuse_with_tensors(path, {"experts.up": trained.experts.up.long()})


@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), in_header=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_damaged_byte_gives_a_state_or_a_clear_refusal(
    trained: lemoe.AdaptorState, tmp_path_factory: Any, position: float, value: int, in_header: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    lemoe.save_adaptor(trained, path, overwrite=True)
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    content[int(position * end)] = value
    path.write_bytes(bytes(content))
    with suppress(AdaptorError):
        assert len(lemoe.load_adaptor(path).rounds) == 2


def test_an_adaptor_of_another_base_is_refused_with_the_differences(tiny: Any, path: Path) -> None:
    base = tiny("gpt2")
    with pytest.raises(AdaptorError) as caught:
        lemoe.insert(base, path)
    message = str(caught.value)
    assert "architecture: LlamaForCausalLM != GPT2LMHeadModel" in message
    assert "intermediate: 48 != 128" in message
    assert "gated: True != False" in message
    assert "generate" not in vars(base.model)


def train_separately(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf
) -> tuple[lemoe.AdaptorState, lemoe.AdaptorState]:
    """The rounds of two independent runs."""
    return lemoe.train_round(base, facts[:2], paper()), lemoe.train_round(base, facts[2:4], paper(seed=5))


def save_parts(folder: Path, *states: lemoe.AdaptorState) -> list[Path]:
    paths = [folder / f"part-{number}.safetensors" for number in range(len(states))]
    for state, path in zip(states, paths, strict=True):
        lemoe.save_adaptor(state, path, overwrite=True)
    return paths


def test_merging_the_rounds_of_one_run_gives_that_runs_adaptor(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    report = lemoe.edit(base, facts, tmp_path / "run", paper())
    rounds = sorted((tmp_path / "run" / "rounds").iterdir())
    merge_adaptors(rounds, tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == report.path.read_bytes()
    assert len(rounds) == 3


def test_a_round_that_several_adaptors_hold_counts_once(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    report = lemoe.edit(base, facts, tmp_path / "run", paper())
    first = tmp_path / "run" / "rounds" / "0001.safetensors"
    merge_adaptors([first, report.path, first, report.path], tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == report.path.read_bytes()


def test_one_adaptor_merged_alone_is_itself(path: Path, tmp_path: Path) -> None:
    merge_adaptors([path], tmp_path / "merged.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == path.read_bytes()


def test_adaptors_trained_separately_keep_their_experts_and_their_own_projections(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    one, two = train_separately(base, facts, paper)
    merge_adaptors(save_parts(tmp_path, one, two), tmp_path / "merged.safetensors")
    merged = lemoe.load_adaptor(tmp_path / "merged.safetensors")
    assert [record.id for record in merged.rounds] == [one.rounds[0].id, two.rounds[0].id]
    for index, state in enumerate((one, two)):
        assert merged.experts.select([index]) == state.experts
        router = get_key_router(merged)
        assert router.projections[int(router.lineage[index])] == get_key_router(state).projections[0]


def normalise_rms(vectors: Tensor) -> Tensor:
    return vectors / (vectors.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def expected_route(base: lemoe.BaseModel, states: list[lemoe.AdaptorState], prompt: str) -> tuple[int, float]:
    """Paper, 3.2, for experts of which each was trained alone: softmax over key . W_up(SiLU(W_down e))."""
    pooled = normalise_rms(base.embedding(torch.tensor(base.tokenizer(prompt).input_ids)).float().mean(0))
    scores = []
    for state in states:
        (projection,) = get_key_router(state).projections
        value = projection.up @ torch.nn.functional.silu(projection.down @ pooled)
        scores.append(float(normalise_rms(value) @ normalise_rms(get_key_router(state).keys[0])) / len(value) ** 0.5)
    weights = torch.tensor(scores).softmax(0)
    return int(weights.argmax()), float(weights.max())


def test_merged_adaptors_route_by_each_experts_own_key_and_projection(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf
) -> None:
    parts = list(train_separately(base, facts, paper))
    asked = [edit.prompt for edit in facts]
    with lemoe.insert(base, lemoe.stack(parts)) as adaptor:
        routes = adaptor.explain([base.tokenizer(prompt).input_ids for prompt in asked])
    for prompt, route in zip(asked, routes, strict=True):
        expert, weight = expected_route(base, parts, prompt)
        assert route.expert == expert
        assert route.weight == pytest.approx(weight, abs=1e-5)
    assert {route.expert for route in routes} == {0, 1}


def test_a_merged_adaptor_can_be_continued(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, tmp_path: Path
) -> None:
    merged = lemoe.stack(train_separately(base, facts, paper))
    report = lemoe.edit(base, facts, tmp_path / "run", paper(steps=1), lemoe.EditOptions(start=merged))
    assert lemoe.load_adaptor(report.path).rounds[:2] == merged.rounds
    assert report.taught == 2
    assert report.state.experts.select([0, 1]) == merged.experts


def test_adaptors_of_different_bases_are_refused_with_the_differences(edited: Any, tmp_path: Path) -> None:
    paths = save_parts(tmp_path, edited("llama"), edited("gpt2"))
    with pytest.raises(AdaptorError) as caught:
        merge_adaptors(paths, tmp_path / "merged.safetensors")
    message = str(caught.value)
    assert "adaptor 2: architecture: LlamaForCausalLM != GPT2LMHeadModel" in message
    assert all(str(path) in message for path in paths)
    assert not (tmp_path / "merged.safetensors").exists()


def test_adaptors_beside_different_layers_are_refused(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf
) -> None:
    states = [lemoe.train_round(base, facts[:2], paper(steps=1, layer=layer)) for layer in (0, 1)]
    with pytest.raises(AdaptorError, match="adaptor 2: layer: 0 != 1"):
        lemoe.stack(states)


def test_adaptors_with_different_routing_settings_are_refused(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf
) -> None:
    states = [lemoe.train_round(base, facts[:2], paper(steps=1, router_width=width)) for width in (16, 24)]
    with pytest.raises(AdaptorError, match="adaptor 2: router_width: 16 != 24"):
        lemoe.stack(states)


def test_adaptors_with_experts_of_different_widths_stack(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf
) -> None:
    narrow = lemoe.train_round(base, facts[:2], paper(steps=1, width=4))
    wide = lemoe.train_round(base, facts[2:4], paper(steps=1, width=12))
    assert lemoe.stack([narrow, wide]).experts.offsets.tolist() == [0, 4, 16]


def test_stacking_nothing_is_refused() -> None:
    with pytest.raises(AdaptorError, match="nothing to stack"):
        lemoe.stack([])


def test_a_merge_does_not_overwrite_a_file(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        merge_adaptors([path], output)
    assert output.read_bytes() == b"precious"


def test_names_and_revisions_are_labels_and_do_not_keep_adaptors_apart(
    trained: lemoe.AdaptorState, base: lemoe.BaseModel
) -> None:
    renamed = replace(trained, base=replace(trained.base, name="my-copy", revision="v2"))
    assert len(lemoe.stack([trained, renamed]).rounds) == 2
    lemoe.insert(base, renamed).remove()


def test_two_continuations_of_one_adaptor_route_alike_in_either_order_of_merging(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf
) -> None:
    fast = paper(router_learning_rate=0.05)
    start = lemoe.train_round(base, facts[:2], fast)
    branches = [lemoe.stack([start, lemoe.train_round(base, edits, fast, start)]) for edits in (facts[2:4], facts[4:])]
    reached = []
    for parts in (branches, branches[::-1]):
        merged = lemoe.stack(parts)
        with lemoe.insert(base, merged) as adaptor:
            routes = adaptor.explain([base.tokenizer(edit.prompt).input_ids for edit in facts])
        reached.append([(merged.rounds[route.expert].id, round(route.weight, 4)) for route in routes])
    assert reached[0] == reached[1]


def test_a_round_that_claims_more_experts_than_there_are_costs_no_memory(
    path: Path, trained: lemoe.AdaptorState
) -> None:
    claims = replace(trained.rounds[0], experts=2**40)
    lemoe.save_adaptor(replace(trained, rounds=(claims, *trained.rounds[1:])), path, overwrite=True)
    with pytest.raises(AdaptorError, match="more experts than it has"):
        lemoe.load_adaptor(path)


@pytest.mark.parametrize(
    ("name", "rounds", "edits", "experts", "superseded", "dropped"),
    [("anchor", 2, 4, 4, 1, 1), ("paper", 2, 4, 2, 0, 0), ("compacted", 1, 6, 1, 0, 0)],
)
def test_a_file_that_the_first_version_wrote_is_read_for_ever(
    name: str, rounds: int, edits: int, experts: int, superseded: int, dropped: int
) -> None:
    state = lemoe.load_adaptor(REPOSITORY / "tests" / "files" / f"{name}-v1.safetensors")
    assert (len(state.rounds), len(state.edits), len(state.experts)) == (rounds, edits, experts)
    assert (len(state.superseded_edits), len(state.rounds[0].dropped)) == (superseded, dropped)
    assert state.base.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["up", "scale"])
def test_no_state_with_values_that_are_not_finite_is_written(
    tmp_path: Path, trained: lemoe.AdaptorState, name: str
) -> None:
    broken = replace(trained.experts, **{name: getattr(trained.experts, name) * float("nan")})
    with pytest.raises(AdaptorError, match=rf"not written.*experts\.{name}"):
        lemoe.save_adaptor(replace(trained, experts=broken), tmp_path / "out")
    assert not (tmp_path / "out").exists()
