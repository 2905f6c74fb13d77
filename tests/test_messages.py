"""Messages of the library speak of arguments; the command line turns them into its options."""

import ast
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from lemoe.data.files import check_overwrite
from lemoe.errors import OutputError
from lemoe_cli.main import COMMANDS, cli
from lemoe_cli.wording import OPTIONS, name_options

# Options of other programs, and files that tell their readers which command reads them.
FOREIGN = ("serving/vllm_plugin", "base/embedded.py", "report/card.py", "planning/plan.py", "runs/folder.py: # What")


def library_texts() -> list[tuple[str, str]]:
    """Every text in the code of the library, docstrings aside, with its file."""
    found = []
    for path in sorted((REPOSITORY / "lemoe").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        aside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
                found.append((path.relative_to(REPOSITORY / "lemoe").as_posix(), node.value))
    return found


def test_no_message_of_the_library_names_an_option_of_the_command_line() -> None:
    texts = [f"{file}: {text}" for file, text in library_texts()]
    named = [text for text in texts if re.search(r"(?<![\w-])(--[a-z][a-z-]+|-o)\b", text)]
    assert [text for text in named if not text.startswith(FOREIGN)] == []


def test_every_option_in_messages_is_one_of_a_command() -> None:
    commands = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    known = {option for command in commands if command for parameter in command.params for option in parameter.opts}
    named = {name for name in OPTIONS.values() if not name.startswith("`lemoe ")}
    assert named <= known
    assert {f"`lemoe {name}`" for name in COMMANDS} >= set(OPTIONS.values()) - named


def test_arguments_become_options_and_all_else_stays() -> None:
    said = "x.yaml: `steps` is no `model`; give `plan_file` p.yaml, or `overwrite` it: `lemoe edit`"
    assert name_options(said) == "x.yaml: `steps` is no --model; give --plan p.yaml, or --force it: `lemoe edit`"


def test_one_error_speaks_to_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a", "target": "b"}')
    (tmp_path / "plan.yaml").write_text("")
    with pytest.raises(OutputError, match="exists; give another path, or `overwrite` to replace it"):
        check_overwrite(tmp_path / "plan.yaml")
    arguments = ["plan", "edits.jsonl", "-m", "llama", "-o", "plan.yaml"]
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(cli, arguments)
    assert told.exit_code == 2
    assert "plan.yaml exists; give another path, or --force to replace it" in told.stderr
