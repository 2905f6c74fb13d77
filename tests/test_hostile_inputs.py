"""Settings, presets, plans, edits and model folders made to do harm, by hand: each refused in one clear line."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import refused_message
from test_hostile_files import Harm

DEEP = "[" * 5000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML: dict[str, str] = {
    "no end of lists": DEEP,
    "no end of lists below a name": f"steps: {DEEP}",
    "no end of objects": "{a: " * 5000,
    "a list of lists that doubles at each line": f"{LAUGHS}steps: *i\n",
    "a list that holds itself": "steps: &a [*a]\n",
    "a number that is none": 'steps: !!int ""\n',
    "a real number that is none": 'depth: !!float ""\n',
    "a truth that is none": "steps: !!bool perhaps\n",
    "a time that is none": "steps: !!timestamp noon\n",
    "a number of more digits than Python reads": f"steps: {'9' * 5000}\n",
    "a number of more digits than Python writes": f"round_size: 0x{'f' * 5000}\n",
    "Python's own objects": "steps: !!python/object/apply:os.system [touch harmed]\n",
    "a name that is a list": "? [a, b]\n: 1\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "an unknown alias": "steps: *nowhere\n",
    "bytes that are no text": "\udcff\udcfe",
}


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"id": "a", "prompt": "The sky is", "target": "green"}\n')
    return path


def write_hostile(folder: Path, text: str) -> Path:
    path = folder / "hostile.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize("kind", YAML)
def test_a_settings_file_made_to_harm_is_refused(
    edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_hostile(tmp_path, YAML[kind])
    message = refused_message("plan", edits, "-m", "llama", "--config", path)
    assert str(path) in message
    assert len(message) < 4000
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("kind", [*YAML, "a name that is a number", "a layer that is true"])
def test_a_file_of_model_names_made_to_harm_is_refused(
    edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ours = {"a name that is a number": "7: {hub: a/b}\n", "a layer that is true": "b: {hub: a/b, layers: {x: true}}\n"}
    path = write_hostile(tmp_path, {**YAML, **ours}[kind])
    monkeypatch.setenv("LEMOE_MODELS", str(path))
    assert str(path) in refused_message("plan", edits, "-m", "none of these")


@pytest.mark.parametrize("kind", YAML)
def test_a_plan_made_to_harm_is_refused(
    edits: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    path = write_hostile(tmp_path, YAML[kind])
    assert str(path) in refused_message(
        "edit", edits, "-m", tiny_folder("llama"), "--device", "cpu", "-q", "--plan", path
    )


@pytest.mark.parametrize("name", ["edits.json", "edits.jsonl"])
@pytest.mark.parametrize("text", [DEEP, '{"prompt": ' * 5000, '{"prompt": 1' + "0" * 5000 + "}", '{"edits": ' + DEEP])
def test_edits_made_to_harm_are_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert str(path) in refused_message("plan", path, "-m", "llama")


def change_json(name: str, **values: Any) -> Callable[[Path], object]:
    def change_file(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change_file


def _replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))


def _replace_file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


FOLDERS: dict[str, Callable[[Path], object]] = {
    "a pickle that runs a program": _replace_by_pickle,
    "weights that are text": _replace_file("model.safetensors", b"no weights"),
    "a description that is a list": _replace_file("config.json", b"[]"),
    "a description without end": _replace_file("config.json", DEEP.encode()),
    "a width that is text": change_json("config.json", hidden_size="wide"),
    "an activation that is a number": change_json("config.json", hidden_act=7),
    "rope of no kind": change_json("config.json", rope_parameters=[]),
    "a tokenizer without end": _replace_file("tokenizer.json", DEEP.encode()),
    "a tokenizer of nothing": _replace_file("tokenizer.json", b"{}"),
    "a tokenizer's model of no kind": change_json("tokenizer.json", model={"type": "Evil"}),
    "a special token that is a number": change_json("tokenizer_config.json", pad_token=7),
    "a longest text that is text": change_json("tokenizer_config.json", model_max_length="long"),
    "tokenizer settings that are text": _replace_file("tokenizer_config.json", b'"text"'),
    "an end that is text": change_json("generation_config.json", eos_token_id="end"),
    "ends that are lists": change_json("generation_config.json", eos_token_id=[[1]]),
    "generation settings that are a list": _replace_file("generation_config.json", b"[1]"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_model_folder_made_to_harm_is_refused(
    edits: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    FOLDERS[kind](folder)
    message = refused_message("plan", edits, "-m", folder, "--device", "cpu", "-q")
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "harmed").exists()
