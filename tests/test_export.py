"""A whole model folder: transformers loads it without lemoe, and it answers as base and adaptor do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import build_model
from test_cli import lemoe_command

import lemoe
from lemoe.base.frozen.scale import CALIBRATION_TEXTS
from lemoe.errors import AdaptorError, LemoeError, OutputError
from lemoe.exporting import folder as exporting
from lemoe.exporting.code import exported_code
from lemoe.exporting.folder import export_model

pytestmark = pytest.mark.versions

SettingsOf = Callable[..., lemoe.Settings]
FolderOf = Callable[[str], Path]


@pytest.fixture
def adaptor(base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, tmp_path: Path) -> Path:
    path = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(base, facts, anchor()), path)
    return path


def is_removed(folder: Path) -> bool:
    return not [path for path in folder.parent.iterdir() if path.name.startswith((folder.name, f".{folder.name}"))]


@pytest.mark.parametrize(("family", "preset"), [("opt", "anchor"), ("gemma3", "anchor"), ("gpt2", "paper")])
def test_a_folder_answers_as_base_and_adaptor_do(
    tiny: Callable[[str], lemoe.BaseModel],
    tiny_folder: FolderOf,
    facts: list[lemoe.Edit],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    family: str,
    preset: str,
) -> None:
    settings: SettingsOf = request.getfixturevalue(preset)
    lemoe.save_adaptor(lemoe.train_round(tiny(family), facts, settings()), tmp_path / "a.safetensors")
    exported = export_model(str(tiny_folder(family)), [tmp_path / "a.safetensors"], tmp_path / "whole")
    own = len(facts) if preset == "anchor" else 0
    assert exported.compared == own + len(CALIBRATION_TEXTS)


def test_the_command_writes_a_folder_with_the_edits_that_are_not_dropped(
    adaptor: Path, tiny_folder: FolderOf, facts: list[lemoe.Edit], tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    given = ["export", str(tiny_folder("llama")), str(adaptor), "-o", str(folder), "--drop", "fact-1"]
    result = lemoe_command(*given)
    assert result.exit_code == 0, result.output
    assert "bit for bit" in result.stdout
    assert lemoe.load_adaptor(folder).rounds[0].ids == ("fact-0", "fact-2", "fact-3", "fact-4", "fact-5")
    assert (folder / "model.safetensors").read_bytes() == (tiny_folder("llama") / "model.safetensors").read_bytes()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "again")
    inputs = tokenizer(facts[0].prompt, return_tensors="pt")
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert lemoe_command(*given).exit_code == 2  # it is there


def test_what_answers_otherwise_is_not_kept(
    adaptor: Path, tiny_folder: FolderOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def corrupt_code(config: str, model: str, method: str) -> dict[str, str]:
        files = exported_code(config, model, method)
        name = "adaptor_experts.py"
        return {**files, name: files[name].replace("torch.matmul(inner,", "torch.matmul(inner * 1.0001,")}

    monkeypatch.setattr(exporting, "exported_code", corrupt_code)
    with pytest.raises(LemoeError, match="answers 6 of 12 prompts in another way"):
        export_model(str(tiny_folder("llama")), [adaptor], tmp_path / "whole")
    assert is_removed(tmp_path / "whole")


def test_the_folder_is_loaded_with_the_standard_librarys_own_modules(
    adaptor: Path, tiny_folder: FolderOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def add_import(config: str, model: str, method: str) -> dict[str, str]:
        files = exported_code(config, model, method)
        name = "adaptor_experts.py"
        return {**files, name: f"from code import InteractiveConsole\n{files[name]}"}

    monkeypatch.setattr(exporting, "exported_code", add_import)
    export_model(str(tiny_folder("llama")), [adaptor], tmp_path / "whole")
    assert (tmp_path / "whole").is_dir()


def test_another_base_is_refused_and_nothing_is_left(adaptor: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(AdaptorError, match="another base model"):
        export_model(str(tmp_path / "other"), [adaptor], tmp_path / "whole")
    assert is_removed(tmp_path / "whole")


def test_a_folder_that_is_there_stays(adaptor: Path, tiny_folder: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    with pytest.raises(OutputError, match="exists"):
        export_model(str(tiny_folder("llama")), [adaptor], tmp_path / "whole")


def test_weights_in_several_files_are_copied_with_their_index(
    tiny: Callable[[str], lemoe.BaseModel], adaptor: Path, tmp_path: Path
) -> None:
    base = tiny("llama")
    base.model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    base.tokenizer.save_pretrained(tmp_path / "parts")
    export_model(str(tmp_path / "parts"), [adaptor], tmp_path / "whole")
    parts = sorted(path.name for path in (tmp_path / "parts").glob("model*"))
    assert len(parts) > 2
    assert sorted(path.name for path in (tmp_path / "whole").glob("model*") if path.suffix != ".py") == parts
