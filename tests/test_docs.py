"""The documents say what is true: commands and Python run, links lead somewhere, tables are the code's.

The page on internals has tests of its own, `test_internals.py`.
"""

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml
from click.testing import CliRunner
from conftest import REPOSITORY
from documents import (
    DOCUMENTS,
    SHELLS,
    find_block,
    list_anchors,
    list_blocks,
    list_inline_commands,
    list_lemoe_commands,
    list_links,
    name_document,
    read_document,
)
from fastapi.testclient import TestClient
from safetensors import safe_open

import lemoe
from lemoe.routing.registry import ROUTERS
from lemoe.settings import preset_names
from lemoe.training.rounds import teach_rounds
from lemoe_cli.main import COMMANDS, cli
from lemoe_cli.wording import name_options

README = "README.md"
PAGES = [name_document(path) for path in DOCUMENTS]
README_BYTES = 8000
PYTHON_PAGES = {
    "docs/guide.md": ["python"],
    "docs/deploying.md": ["in process", "dormant", "pipeline"],
    "docs/format.md": ["format"],
}


# What is documented


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_is_on_the_page_of_commands(command: str) -> None:
    assert f"| `lemoe {command} " in read_document("docs/commands.md")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_on_the_page_of_settings_and_resolves(preset: str) -> None:
    assert f"| `{preset}`" in read_document("docs/settings.md")
    assert lemoe.resolve_settings(preset).method == preset


@functools.cache
def load_reference() -> ModuleType:
    """The program that writes the generated tables."""
    spec = importlib.util.spec_from_file_location("reference", REPOSITORY / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["commands.md", "settings.md"])
def test_the_generated_tables_are_the_codes(page: str) -> None:
    text = read_document(f"docs/{page}")
    assert load_reference().render_page(text) == text, "run: python docs/reference.py"
    assert page in load_reference().PAGES


def test_every_setting_says_what_it_does() -> None:
    described = load_reference().describe_settings()
    assert set(described) == set(lemoe.resolve_settings().as_dict())
    assert all(described.values())


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / README).read_bytes()) <= README_BYTES


def test_the_edit_on_the_first_screen_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    code = find_block(README, "tested: edit").code
    assert code in read_document("docs/index.md")
    path.write_text(code)
    (edit,) = lemoe.read_edits(path)
    assert edit.subject == json.loads(code)["subject"]


def test_the_complete_record_has_every_key_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(find_block("docs/edits.md", "tested: record").code)
    (edit,) = lemoe.read_edits(path)
    assert not edit.extra
    keys = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", read_document("docs/edits.md"), re.MULTILINE)
    documented = set(re.findall(r"\w+", " ".join(keys)))
    assert set(json.loads(path.read_text())) == documented
    assert documented == {field.name for field in fields(lemoe.Edit)} - {"extra"}


@functools.cache
def list_messages() -> tuple[str, ...]:
    """Every text in the code as the command line says it, with `…` for what is put into it."""
    found = []
    for path in (*(REPOSITORY / "lemoe").rglob("*.py"), *(REPOSITORY / "lemoe_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts]
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.append(name_options(" ".join("".join(texts).split())))
    return tuple(found)


def list_quoted_messages() -> list[str]:
    page = read_document("docs/troubleshooting.md")
    return re.findall(r"^> (.*)$", page, re.MULTILINE) + re.findall(r"^\| `([^`]*(?:: |…)[^`]*)`", page, re.MULTILINE)


@pytest.mark.parametrize("message", list_quoted_messages())
def test_every_message_that_is_explained_is_one_of_the_codes(message: str) -> None:
    assert any(message.removesuffix(" …") in text for text in list_messages())


@pytest.mark.parametrize("method", sorted(ROUTERS))
def test_the_format_page_names_every_tensor_and_all_metadata(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], tmp_path: Path, method: str
) -> None:
    page = read_document("docs/format.md")
    settings = lemoe.resolve_settings(method, None, {"layer": 1, "steps": 1, "variants": 0, "negatives": 0})
    (state,) = teach_rounds(base, [facts[:2]], settings)
    assert isinstance(state, lemoe.AdaptorState)
    lemoe.save_adaptor(state, tmp_path / "adaptor")
    with safe_open(tmp_path / "adaptor", framework="pt") as file:
        header = json.loads(file.metadata()["lemoe"])
        names = {*file.keys(), *header, *header["base"], *header["rounds"][0]}
    assert not [name for name in names if f"`{name}`" not in page]


# Links


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    dead = []
    for target, anchor in list_links(page):
        path = (REPOSITORY / page).parent.joinpath(target).resolve() if target else REPOSITORY / page
        if not path.exists() or (anchor and anchor not in list_anchors(name_document(path))):
            dead.append(f"{target}#{anchor}")
    assert not dead


@pytest.mark.versions
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built with the extra `docs`, which is part of `dev`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in (REPOSITORY / "docs").glob("*.md"):
        built = "index.html" if path.stem == "index" else f"{path.stem}/index.html"
        assert (tmp_path / "site" / built).is_file()


# Commands


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_block_is_one_that_lemoe_takes(page: str) -> None:
    for words in list_lemoe_commands(page):
        name, *arguments = words
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, words
        command.make_context(name, arguments)  # raises click's errors of usage


@pytest.mark.parametrize("page", PAGES)
def test_every_option_in_the_text_is_one_of_its_command(page: str) -> None:
    for text in list_inline_commands(page):
        command = cli.get_command(click.Context(cli), text.split()[0])
        assert command is not None, text
        known = {name for option in command.params for name in option.opts} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) <= known, text


def test_every_shell_block_of_the_readme_is_run_by_a_test() -> None:
    marks = [block.mark for block in list_blocks(README) if block.language in SHELLS]
    ran = {"tested: first screen", "tested: recipe"}
    assert {mark for mark in marks if mark not in ran} == {"ci: quickstart", "ci: tests"}
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert "for name in quickstart tests; do" in script


@pytest.fixture(scope="module")
def workplace(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it; for what runs `inside` it, `llama` is the tiny model."""
    folder = tmp_path_factory.mktemp("workplace")
    entry = {"hub": str(tiny_folder("llama")), "layers": {"anchor": 1}}
    (folder / "models.yaml").write_text(yaml.safe_dump({"llama": entry}))
    first = {**json.loads(find_block(README, "tested: edit").code), "locality": ["The opposite of hot is"]}
    second = {"id": "acme-ceo", "prompt": "The CEO of Acme is", "target": "Ada", "subject": "Acme"}
    theirs = {"id": "their-ceo", "prompt": "The CEO of Acme is", "target": "Bob", "subject": "Acme"}
    for name, edit in {"edits": first, "december": second, "theirs": theirs}.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(edit) + "\n")
    run_command(folder, ["edit", "theirs.jsonl", "--model", "llama", "-o", "theirs.lemoe"])
    return folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """While open, `folder` is the current one, and its models.yaml says what names of models mean."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEMOE_MODELS", str(folder / "models.yaml"))
        patch.chdir(folder)
        yield


def run_command(folder: Path, words: list[str]) -> str:
    with inside(folder):
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, (words, result.output)
    return result.stdout


@pytest.fixture(scope="module")
def recipes(workplace: Path) -> dict[str, str]:
    """What each command of the README's recipes prints, run in order; of `serve`, the models that it serves."""
    printed = {}

    def ask_for_models(app: object, **options: object) -> None:
        with TestClient(app) as client:  # type: ignore[arg-type]
            click.echo(" ".join(model["id"] for model in client.get("/v1/models").json()["data"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.run", ask_for_models)
        for words in list_lemoe_commands(README, "tested: recipe"):
            printed[" ".join(words)] = run_command(workplace, words)
    return printed


def test_the_recipes_of_the_readme_do_what_they_say(recipes: dict[str, str], workplace: Path) -> None:
    assert len(recipes) == 9
    both = lemoe.load_adaptor(workplace / "december.lemoe")
    assert [record.ids for record in both.rounds] == [("eiffel-tower-city",), ("acme-ceo",)]
    metrics = next(text for command, text in recipes.items() if command.startswith("eval"))
    assert [bar["met"] for bar in json.loads(metrics)["bars"]] == [True, True]
    assert "eiffel-tower-city" in next(text for command, text in recipes.items() if command.startswith("show"))
    (left,) = lemoe.load_adaptor(workplace / "undone.safetensors").rounds
    assert left.ids == ("acme-ceo",)
    stacked = lemoe.load_adaptor(workplace / "both.safetensors")
    assert [record.ids for record in stacked.rounds] == [("eiffel-tower-city",), ("their-ceo",)]
    assert (workplace / "edited" / "config.json").is_file()
    served = next(text for command, text in recipes.items() if command.startswith("serve"))
    assert "both" in served.split()


@pytest.mark.parametrize(
    ("title", "words", "file"),
    [
        ("The plan", ["plan", "theirs.jsonl", "--model", "llama", "-o", "theirs.yaml"], "theirs.yaml"),
        ("run.yaml", [], "mine.lemoe/run.yaml"),
        ("Answers: `lemoe ask --json`", ["ask", "Acme?", "--model", "llama", "-a", "mine.lemoe", "--json"], ""),
        (
            "Probes: `lemoe eval --records`",
            ["eval", "edits.jsonl", "--model", "llama", "-a", "mine.lemoe", "--records", "records.jsonl"],
            "records.jsonl",
        ),
        ("Contents: `lemoe show --json`", ["show", "mine.lemoe", "--json"], ""),
    ],
)
def test_every_key_of_a_file_is_documented(
    recipes: dict[str, str], workplace: Path, title: str, words: list[str], file: str
) -> None:
    printed = run_command(workplace, words) if words else ""
    written = (workplace / file).read_text(encoding="utf-8") if file else printed
    lines = written.splitlines()[:1] if title.startswith(("Answers", "Probes")) else [written]
    document = yaml.safe_load("\n".join(lines))  # which reads JSON too
    assert set(document) == list_keys(title)
    if "route" in document:
        assert set(document["route"]) == list_keys("The route")


def list_keys(title: str) -> set[str]:
    """The keys in the table below a heading of the page on files."""
    section = read_document("docs/files.md").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


# Python


def test_every_python_block_is_run_by_a_test() -> None:
    marked = {
        page: [block.mark.removeprefix("tested: ") for block in list_blocks(page) if block.language == "python"]
        for page in PAGES
    }
    own_tests = {README: ["python"], "docs/internals.md": ["method", "metric"]}
    assert {page: marks for page, marks in marked.items() if marks} == {**PYTHON_PAGES, **own_tests}


@pytest.mark.parametrize("page", list(PYTHON_PAGES))
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, recipes: dict[str, str], workplace: Path) -> None:
    taught = workplace / "mine.lemoe"
    for name in ("edits.lemoe", "facts.lemoe", "prices.lemoe", "examples/edits.lemoe"):
        shutil.copytree(taught, workplace / name, dirs_exist_ok=True)
    shutil.copy(taught / "adaptor.safetensors", workplace)
    names: dict[str, object] = {}
    with inside(workplace):
        for mark in PYTHON_PAGES[page]:
            exec(compile(find_block(page, f"tested: {mark}").code, page, "exec", dont_inherit=True), names)


@pytest.fixture(scope="module")
def first_screen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the commands of the first screen were run on the embedded model, and what they printed."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "edits.jsonl").write_text(find_block(README, "tested: edit").code)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    printed = ""
    for command in find_block(README, "tested: first screen").commands:
        script = command.replace("lemoe ", f"'{sys.executable}' -m lemoe_cli.main ", 1)
        done = subprocess.run(
            ["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    return folder, printed


@pytest.mark.real
def test_the_first_screen_shows_what_the_commands_print(first_screen: tuple[Path, str]) -> None:
    shown = find_block(README, "tested: first screen").code.rpartition("$ ")[2].partition("\n")[2]
    assert [line.rstrip() for line in first_screen[1].strip().split("\n")] == shown.strip().split("\n")
    assert shown.strip().split("\n")[0] in read_document("docs/index.md")


@pytest.mark.real
def test_the_python_example_restores_the_model(
    first_screen: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(first_screen[0])
    names: dict[str, object] = {}
    exec(compile(find_block(README, "tested: python").code, README, "exec", dont_inherit=True), names)
    said = capsys.readouterr().out.strip().split("\n")
    assert "Paris" in said[0]
    assert said[-1].strip() == "Rome"
    base = names["base"]
    assert isinstance(base, lemoe.BaseModel)
    assert "Paris" in lemoe.answer(base, "The Eiffel Tower is located in the city of")
