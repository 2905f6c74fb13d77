"""An adaptor on a base that it was not made for: refused with both fingerprints, or allowed, with a warning."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from test_cli import lemoe_command, refused_message
from torch.testing._internal.two_tensor import TwoTensor

import lemoe
from lemoe.base.fingerprint import ffn_checksum
from lemoe.errors import AdaptorError

SettingsOf = Callable[..., lemoe.Settings]


@pytest.fixture(scope="module")
def tuned_folder(tmp_path_factory: pytest.TempPathFactory, base: lemoe.BaseModel) -> Path:
    """The tiny llama after a fine-tune of one attention matrix."""
    folder = build_model(tmp_path_factory.mktemp("tuned") / "llama", "llama")
    other = lemoe.load_base(str(folder), device="cpu")
    weight = other.model.get_parameter("model.layers.0.self_attn.q_proj.weight").data
    weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    other.model.save_pretrained(folder)
    return folder


@pytest.fixture
def adaptor(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> Path:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(base, facts[:2], anchor()), path)
    return path


@pytest.fixture
def edits(facts: list[lemoe.Edit], tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    lines = [json.dumps({"id": e.id, "prompt": e.prompt, "target": e.target, "subject": e.subject}) for e in facts[:4]]
    path.write_text("\n".join(lines))
    return path


def test_a_fine_tune_of_the_same_shape_is_refused_with_both_fingerprints(
    base: lemoe.BaseModel, tuned_folder: Path, adaptor: Path, edits: Path
) -> None:
    tuned = lemoe.load_base(str(tuned_folder), device="cpu")
    said = refused_message("eval", edits, "--adaptor", adaptor, "--model", tuned_folder, "--device", "cpu")
    assert "made for another base model" in said
    for model in (base, tuned):
        assert model.fingerprint(1).weights_sha256 in said


def test_it_may_be_measured_all_the_same_with_a_warning_on_record(
    tuned_folder: Path, adaptor: Path, edits: Path
) -> None:
    where = ("--adaptor", adaptor, "--model", tuned_folder, "--device", "cpu")
    done = lemoe_command("eval", edits, *where, "--allow-base-mismatch", "--json")
    assert done.exit_code == 0
    assert "warning: another base than the adaptor was made for: weights_sha256" in done.stderr
    (difference,) = json.loads(done.stdout)["settings"]["base_differences"]
    assert difference.startswith("weights_sha256: ")


def test_it_may_be_continued_and_its_rounds_say_on_what(
    tuned_folder: Path, adaptor: Path, edits: Path, tmp_path: Path
) -> None:
    small = ("--round-size", "2", "--steps", "4", "--device", "cpu", "-o", tmp_path / "run")
    said = refused_message("edit", edits, "--from", adaptor, "--model", tuned_folder, *small)
    assert "made for another base model" in said
    done = lemoe_command("edit", edits, "--from", adaptor, "--model", tuned_folder, *small, "--allow-base-mismatch")
    assert done.exit_code == 0, done.stderr
    assert "another base than the adaptor was made for: weights_sha256" in done.stderr
    rounds = lemoe.load_adaptor(tmp_path / "run").rounds
    assert rounds[0].base_differences == ()
    assert rounds[1].base_differences[0].startswith("weights_sha256: ")


def test_a_base_in_which_it_has_no_place_is_refused_in_any_case(
    tiny_folder: Callable[[str], Path], adaptor: Path, edits: Path
) -> None:
    said = refused_message(
        "eval", edits, "-a", adaptor, "--model", tiny_folder("gpt2"), "--device", "cpu", "--allow-base-mismatch"
    )
    assert "gated: True != False" in said


def test_rounds_of_different_bases_have_different_ids(
    base: lemoe.BaseModel, tuned_folder: Path, facts: list[lemoe.Edit], anchor: SettingsOf
) -> None:
    tuned = lemoe.load_base(str(tuned_folder), device="cpu")
    one = lemoe.train_round(base, facts[:2], anchor())
    other = lemoe.train_round(tuned, facts[:2], anchor(), one)
    assert one.rounds[0].id != other.rounds[0].id


def test_inserting_is_refused_or_allowed_in_the_library_too(tuned_folder: Path, adaptor: Path) -> None:
    tuned = lemoe.load_base(str(tuned_folder), device="cpu")
    with pytest.raises(AdaptorError, match="weights_sha256"):
        lemoe.insert(tuned, adaptor)
    lemoe.insert(tuned, adaptor, allow_base_mismatch=True).remove()


def test_a_weight_that_is_stored_in_parts_is_hashed_by_its_parts(tiny_folder: Callable[[str], Path]) -> None:
    """As quantised weights are: integers and scales in one tensor that is none of its own."""
    base = lemoe.load_base(str(tiny_folder("llama")), device="cpu")
    layer: Any = base.model.get_submodule("model.layers.1.mlp.down_proj")
    plain, seen = base.fingerprint(1), []
    for factor in (2, 3):
        parts = TwoTensor(layer.weight.detach().clone(), factor * torch.ones_like(layer.weight))
        layer.weight = torch.nn.Parameter(parts, requires_grad=False)
        seen.append((base.fingerprint(1), ffn_checksum(base.ffn_site(1))))
    assert seen[0][1] != seen[1][1]
    assert len({plain.ffn_sha256, *(fingerprint.ffn_sha256 for fingerprint, _ in seen)}) == 3
    assert len({plain.weights_sha256, *(fingerprint.weights_sha256 for fingerprint, _ in seen)}) == 3
