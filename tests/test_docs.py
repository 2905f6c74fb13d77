"""The README says what is true: its Python runs, its commands exist, its edit can be read."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import lemoe
from lemoe.routing.registry import ROUTERS
from lemoe.settings import preset_names
from lemoe.training.rounds import teach_rounds
from lemoe_cli.main import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def first_block(language: str) -> str:
    """The first code block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found[1]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`lemoe {command} " in README


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_in_the_readme_and_resolves(preset: str) -> None:
    assert f"| `{preset}`" in README
    assert lemoe.resolve_settings(preset).method == preset


def test_the_edit_on_the_first_screen_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(first_block("json"))
    (edit,) = lemoe.read_edits(path)
    assert edit.subject == json.loads(first_block("json"))["subject"]


@pytest.mark.real
def test_the_python_example_teaches_and_restores_the_model(
    tmp_path: Path, real_base: lemoe.BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = lemoe.read_edits(REPOSITORY / "examples" / "edits.jsonl")[:4]
    adaptor = tmp_path / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(real_base, edits, lemoe.resolve_settings()), adaptor)
    code = first_block("python").replace("examples/edits.lemoe/adaptor.safetensors", str(adaptor))
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out.strip().split("\n")
    assert "Paris" in said[0]
    assert said[-1].strip() == "Rome"


@pytest.mark.parametrize("method", sorted(ROUTERS))
def test_the_format_page_names_every_tensor_and_all_metadata(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], tmp_path: Path, method: str
) -> None:
    page = (REPOSITORY / "docs" / "format.md").read_text(encoding="utf-8")
    settings = lemoe.resolve_settings(method, None, {"layer": 1, "steps": 1, "variants": 0, "negatives": 0})
    (state,) = teach_rounds(base, [facts[:2]], settings)
    assert isinstance(state, lemoe.AdaptorState)
    lemoe.save_adaptor(state, tmp_path / "adaptor")
    with safe_open(tmp_path / "adaptor", framework="pt") as file:
        header = json.loads(file.metadata()["lemoe"])
        names = {*file.keys(), *header, *header["base"], *header["rounds"][0]}
    assert not [name for name in names if f"`{name}`" not in page]
