"""Adaptor files made to do harm, by hand, with a valid hash where they can have one: all refused."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import refused_message
from torch import Tensor

import lemoe
from lemoe.adaptor.header import FORMAT, METADATA_KEY
from lemoe.adaptor.tensor_file import TensorEntry, write_tensors
from lemoe.errors import AdaptorError

Metadata = dict[str, Any]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="session")
def honest(
    base: lemoe.BaseModel,
    facts: list[lemoe.Edit],
    anchor: Callable[..., lemoe.Settings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A valid adaptor of two rounds with two edits each."""
    path = tmp_path_factory.mktemp("honest") / "adaptor.safetensors"
    rounds = [lemoe.train_round(base, edits, anchor(steps=2)) for edits in (facts[:2], facts[2:4])]
    lemoe.save_adaptor(lemoe.stack(rounds), path)
    return path


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def prepend_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def change_table(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its table of tensors changed."""
    header, data = split_header(content)
    change(header)
    return prepend_header(json.dumps(header).encode(), data)


class Harm:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch harmed",)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing at all": lambda content: b"",
    "a header's length alone": lambda content: (64).to_bytes(8, "little"),
    "a header longer than any file": lambda content: (2**63 - 1).to_bytes(8, "little") + content[8:],
    "a header longer than the file": lambda content: len(content).to_bytes(8, "little") + content[8:],
    "a header that is no text": lambda content: prepend_header(b"\xff\xfe" * 40),
    "a header that is a list": lambda content: prepend_header(b"[]"),
    "a header without end": lambda content: prepend_header(b"[" * 100_000),
    "a pickle": lambda content: pickle.dumps(Harm()),
    "a pickle behind a header": lambda content: prepend_header(b"{}", pickle.dumps(Harm())),
    "a compressed adaptor": gzip.compress,
    "bytes behind the last tensor": lambda content: content + b"\0" * 8,
    "tensors that overlap": lambda content: change_table(
        content, lambda t: t["experts.up"].update(data_offsets=t["experts.down"]["data_offsets"])
    ),
    "a tensor beyond the end": lambda content: change_table(
        content, lambda t: t["experts.up"].update(data_offsets=[2**40, 2**40 + 4])
    ),
    "a tensor that ends before it starts": lambda content: change_table(
        content, lambda t: t["experts.up"].update(data_offsets=[64, 0])
    ),
    "a tensor at a negative offset": lambda content: change_table(
        content, lambda t: t["experts.up"].update(data_offsets=[-64, 0])
    ),
    "a shape larger than memory": lambda content: change_table(
        content, lambda t: t["experts.up"].update(shape=[2**31, 2**31])
    ),
    "a shape that overflows": lambda content: change_table(
        content, lambda t: t["experts.up"].update(shape=[2**62, 2**62, 4])
    ),
    "an unknown type": lambda content: change_table(content, lambda t: t["experts.up"].update(dtype="F999")),
    "metadata that are no text": lambda content: change_table(content, lambda t: t.update(__metadata__={"lemoe": 1})),
    "metadata without end": lambda content: change_table(
        content, lambda t: t.update(__metadata__={"lemoe": '{"format": 1, "rounds": ' + "[" * 50_000})
    ),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_made_to_harm_are_refused(honest: Path, tmp_path: Path, monkeypatch: Any, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(BYTES[kind](honest.read_bytes()))
    assert str(path) in refused_message("show", path)
    assert not (tmp_path / "harmed").exists()


def first_round(metadata: Metadata, **changes: Any) -> None:
    metadata["rounds"][0].update(changes)


METADATA: dict[str, Callable[[Metadata], object]] = {
    "more experts than the world has memory": lambda m: first_round(m, experts=2**40),
    "fewer experts than none": lambda m: first_round(m, experts=-2),
    "a number of experts that is text": lambda m: first_round(m, experts="4"),
    "an id that is a list": lambda m: first_round(m, id=["a"]),
    "edits that are a number": lambda m: first_round(m, edits=7),
    "more names than edits": lambda m: first_round(m, ids=["a"] * 2000),
    "rounds that are an object": lambda m: m.update(rounds={"0": m["rounds"][0]}),
    "a round too few": lambda m: m["rounds"].pop(),
    "a round too many": lambda m: m["rounds"].append(m["rounds"][0]),
    "an unknown key in a record": lambda m: first_round(m, run="rm -rf /"),
    "a base wider than memory": lambda m: m["base"].update(hidden=2**62),
    "a base of negative width": lambda m: m["base"].update(hidden=-32),
    "a width that is text": lambda m: m["base"].update(hidden="32"),
    "a base without a gate": lambda m: m["base"].update(gated=False),
    "a method that is not there": lambda m: m["settings"].update(method="../../presets/evil"),
    "a method without a router": lambda m: m["settings"].update(method="ft"),
    "the other method": lambda m: m["settings"].update(method="paper"),
    "a threshold that is no number": lambda m: m["settings"].update(gate_conflict="NaN"),
    "an unknown setting": lambda m: m["settings"].update(command="rm"),
    "a format to come": lambda m: m.update(format=FORMAT + 1),
    "more prompts than edits": lambda m: first_round(m, prompts=["a"] * 2000),
    "targets without prompts": lambda m: first_round(m, prompts=[]),
    "a prompt that is a number": lambda m: first_round(m, prompts=[7] * len(m["rounds"][0]["edits"])),
    "prompts that are one text": lambda m: first_round(m, prompts="ab"),
    "a format that is true": lambda m: m.update(format=True),
    "a format that is a real number": lambda m: m.update(format=1.0),
    "a tool that is a list": lambda m: m.update(tool=["lemoe"]),
    "no tool": lambda m: m.pop("tool"),
    "an unknown key": lambda m: m.update(run="rm -rf /"),
    "a layer that is text": lambda m: m["settings"].update(layer="1"),
    "a depth that is true": lambda m: m["settings"].update(depth=True),
    "a format that is text": lambda m: m.update(format="1; rm"),
}


def rewrite_file(honest: Path, path: Path, metadata: Metadata, tensors: Tensors) -> None:
    """Write what is given, whatever it is, with the hash that it should have."""
    entries = {name: TensorEntry.from_tensor(tensor) for name, tensor in tensors.items()}
    write_tensors(path, METADATA_KEY, metadata, entries, overwrite=True)


def read_parts(honest: Path) -> tuple[Metadata, Tensors]:
    metadata = json.loads(split_header(honest.read_bytes())[0]["__metadata__"][METADATA_KEY])
    metadata.pop("sha256")
    return metadata, load_file(honest)


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_made_to_harm_are_refused(honest: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile.safetensors"
    metadata, tensors = read_parts(honest)
    METADATA[kind](metadata)
    rewrite_file(honest, path, metadata, tensors)
    assert str(path) in refused_message("show", path)


def _nan(tensor: Tensor) -> Tensor:
    broken = tensor.clone()
    broken.flatten()[-1] = torch.nan
    return broken


TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "a value that is not a number": lambda t: {"experts.up": _nan(t["experts.up"])},
    "an endless scale": lambda t: {"experts.scale": t["experts.scale"] * torch.inf},
    "experts as whole numbers": lambda t: {"experts.up": t["experts.up"].long()},
    "experts on their side": lambda t: {"experts.up": t["experts.up"].T.contiguous()},
    "a matrix without rows": lambda t: {"experts.down": t["experts.down"][:0]},
    "offsets that fall": lambda t: {"experts.offsets": t["experts.offsets"].flip(0)},
    "offsets beyond the end": lambda t: {"experts.offsets": t["experts.offsets"] * 2**50},
    "offsets below zero": lambda t: {"experts.offsets": t["experts.offsets"] - 4},
    "tokens below zero": lambda t: {"anchors.prompt": t["anchors.prompt"] - 100_000},
    "a prompt without tokens": lambda t: {
        "anchors.prompt": t["anchors.prompt"][:0],
        "anchors.prompt_offsets": t["anchors.prompt_offsets"] * 0,
    },
    "a subject that is no text": lambda t: {"anchors.subject": t["anchors.subject"] * 0 + 0xFF},
    "a tensor of another tool": lambda t: {"lora_A.weight": torch.zeros(4, 4)},
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_made_to_harm_are_refused(honest: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile.safetensors"
    metadata, tensors = read_parts(honest)
    rewrite_file(honest, path, metadata, {**tensors, **TENSORS[kind](tensors)})
    assert str(path) in refused_message("show", path)


@pytest.mark.parametrize("name", ["anchors.prompt", "anchors.target"])
def test_tokens_that_the_base_does_not_know_are_refused_when_it_is_inserted(
    honest: Path, base: lemoe.BaseModel, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "hostile.safetensors"
    metadata, tensors = read_parts(honest)
    rewrite_file(honest, path, metadata, {**tensors, name: tensors[name] * 0 + 2**31 - 1})
    with pytest.raises(AdaptorError, match="tokens that the base model does not know"):
        lemoe.insert(base, path)


def test_a_pipe_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert "not a file" in refused_message("show", path)


def test_names_that_lead_out_of_the_folder_are_names_only(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    metadata, tensors = read_parts(honest)
    first_round(metadata, ids=["../../../etc/passwd", "/etc/passwd\0"])
    rewrite_file(honest, path, metadata, tensors)
    lemoe.save_adaptor(lemoe.load_adaptor(path), tmp_path / "out" / "copy.safetensors")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["copy.safetensors", "hostile.safetensors", "out"]


def test_metadata_beside_our_own_are_refused(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(change_table(honest.read_bytes(), lambda t: t["__metadata__"].update(note="trust me")))
    assert "no hash covers" in refused_message("show", path, "--verify")
