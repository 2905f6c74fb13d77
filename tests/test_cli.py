"""The `lemoe` command: help, the whole way from edits to a merged adaptor, and errors as one clear message."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

import lemoe
from lemoe.base import loading
from lemoe.runs.engines import local
from lemoe.training.rounds import train_round
from lemoe_cli import plan as plan_module
from lemoe_cli.command import LemoeCommand
from lemoe_cli.main import cli

COMMANDS = (
    "plan",
    "edit",
    "eval",
    "ask",
    "serve",
    "show",
    "merge",
    "undo",
    "compact",
    "export",
    "push",
    "compare",
    "study",
)
SMALL = ("--preset", "paper", "--layer", "1", "--width", "8", "--steps", "4", "--round-size", "2", "--device", "cpu")


def lemoe_command(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def refused_message(*arguments: Any) -> str:
    """What stderr says of a user's mistake: exit code 2, nothing on stdout, no traceback."""
    result = lemoe_command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert sum("rror: " in line for line in result.stderr.splitlines()) == 1
    return result.stderr


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture
def edits(facts: list[lemoe.Edit], tmp_path: Path) -> Path:
    """The facts as JSON Lines, with probes."""
    path = tmp_path / "edits.jsonl"
    lines = [
        {
            "id": edit.id,
            "prompt": edit.prompt,
            "target": edit.target,
            "subject": edit.subject,
            "rephrases": [f"Tell me: {edit.prompt}"],
            "locality": ["The opposite of hot is"],
        }
        for edit in facts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def adaptor(edits: Path, model: Path, tmp_path: Path) -> Path:
    """The adaptor that `lemoe edit` writes."""
    assert lemoe_command("edit", edits, "--model", model, *SMALL, "-q").exit_code == 0
    return tmp_path / "edits.lemoe" / "adaptor.safetensors"


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_help_names_every_command_and_the_main_job() -> None:
    text = lemoe_command("--help").stdout
    assert "lemoe edit edits.jsonl --model llama" in text
    assert all(f"  {name}  " in text for name in COMMANDS)
    assert lemoe_command("-h").stdout == text


def get_command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = lemoe_command(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: cli {name} [OPTIONS]")
    assert get_command(name).help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    options = [param for param in get_command(name).params if isinstance(param, click.Option)]
    assert options
    assert [option.opts[0] for option in options if not option.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_a_section_and_every_example_is_a_call_that_is_taken(name: str) -> None:
    command = get_command(name)
    assert isinstance(command, LemoeCommand)
    assert [param.name for param in command.params if not hasattr(param, "section")] == [
        param.name for param in command.params if isinstance(param, click.Argument)
    ]
    assert len(command.examples) >= 2
    shown = lemoe_command(name, "--help").stdout
    for example in command.examples:
        assert f"  {example}\n" in shown
        program, named, *arguments = shlex.split(example.partition(" < ")[0])
        assert (program, named) == ("lemoe", name)
        command.make_context(name, arguments)


def test_help_shows_each_default_as_the_preset_resolves_it() -> None:
    def shown_default(option: str, *given: str) -> str:
        text = " ".join(lemoe_command("edit", *given, "--help").stdout.split())
        return text.partition(f" {option} ")[2].partition("[default: ")[2].partition("]")[0].partition(";")[0]

    assert (shown_default("--round-size"), shown_default("--steps")) == ("50", "16")
    assert shown_default("--round-size", "--preset", "paper") == "20"
    assert shown_default("--steps", "--preset=paper") == "60"


MOVED = {
    "eval edits.jsonl -m llama --compare ft,lora --limit 9": "compare edits.jsonl -m llama --presets ft,lora --limit 9",
    "eval edits.jsonl --compare=ft -m llama": "compare edits.jsonl --presets ft -m llama",
    "eval --factors 'my edits.jsonl' -m llama --orders 2": "study 'my edits.jsonl' -m llama --orders 2",
    "merge a.lemoe --compact -m llama -o small": "compact a.lemoe -m llama -o small",
    "merge llama a b --export whole --drop 2": "export llama a b -o whole --drop 2",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_spelling_ends_with_the_new_one_to_type(old: str) -> None:
    result = lemoe_command(*shlex.split(old))
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.endswith(f" is now: lemoe {MOVED[old]}")
    command, *arguments = shlex.split(MOVED[old])
    get_command(command).make_context(command, arguments)


def test_all_commands_are_listed_and_an_unknown_one_is_refused() -> None:
    assert tuple(cli.list_commands(click.Context(cli))) == COMMANDS
    assert "No such command 'edti'. Did you mean 'edit'?" in lemoe_command("edti").stderr


def test_the_version_is_the_packages() -> None:
    assert lemoe_command("--version").stdout == f"lemoe, version {lemoe.__version__}\n"


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "lemoe", "show", "none"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: none: no such file\n")


def complete_last(*words: str) -> list[str]:
    """What a shell is offered for the last of the words, the others being there."""
    *before, last = words
    completion = ShellComplete(cli, {}, "lemoe", "_LEMOE_COMPLETE")
    return [item.value for item in completion.get_completions(before, last) if item.type == "plain"]


def test_a_shell_completes_commands_presets_and_models() -> None:
    assert complete_last("com") == ["compact", "compare"]
    assert complete_last("edit", "edits.jsonl", "--preset", "") == ["anchor", "paper"]
    assert complete_last("study", "edits.jsonl", "--preset", "lora") == ["lora", "lora-merge"]
    assert complete_last("compare", "edits.jsonl", "--presets", "ft,anc") == ["ft,anchor"]
    assert complete_last("edit", "edits.jsonl", "-m", "llama") == ["llama", "llama2-7b", "llama3-8b"]
    assert complete_last("edit", "--conf") == ["--config"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_quiet_or_tells_its_times(name: str) -> None:
    assert {"-q", "-v"} <= {option for param in get_command(name).params for option in param.opts}


def loaded_libraries(arguments: list[str], libraries: set[str]) -> set[str]:
    """Those of `libraries` that a command has loaded when it ends."""
    code = (
        "import sys\n"
        "from lemoe_cli.main import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        f"print(*({libraries!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["eval", "--help"], ["plan", "--help"]])
def test_help_loads_none_of_the_heavy_libraries(arguments: list[str]) -> None:
    assert not loaded_libraries(arguments, {"torch", "transformers", "sklearn", "rich", "numpy"})


@pytest.mark.parametrize("arguments", [["show"], ["merge", "--dry-run"]])
def test_what_only_reads_files_loads_nothing_that_runs_models(arguments: list[str]) -> None:
    file = Path(__file__).parent / "files" / "anchor-v1.safetensors"
    assert not loaded_libraries([*arguments, str(file)], {"transformers", "sklearn", "accelerate"})


HEAVY = ("torch", "transformers", "sklearn", "accelerate")
TOO_SOON = {
    "edit": (
        (["edit", "none.jsonl", "-m", "llama"], "none.jsonl: cannot be read"),
        (["edit", "bad.jsonl", "-m", "llama"], "bad.jsonl:1: "),
        (["edit", "edits.jsonl", "-m", "lama"], "--model lama: no such folder or preset; did you mean llama?"),
        (["edit", "edits.jsonl", "-m", "llama", "--preset", "papr"], "did you mean paper? there is: anchor, paper"),
        (
            ["edit", "edits.jsonl", "-m", "llama", "--preset", "lora"],
            "for comparison alone: `lemoe compare` measures it",
        ),
        (["edit", "bad.csv", "-m", "llama"], "bad.csv:2: "),
        (["edit", "sheet.xlsx", "-m", "llama"], "sheet.xlsx: this is a spreadsheet"),
        (["edit", "edits.jsonl", "-m", "llama", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["edit", "edits.jsonl", "-m", "llama", "--config", "bad.yaml"], "did you mean steps?"),
        (["edit", "edits.jsonl", "-m", "llama", "--from", "none"], "none: no such file"),
        (["edit", "edits.jsonl", "-m", "llama", "--from", "edits.jsonl"], "not a whole safetensors file"),
        (["edit", "edits.jsonl", "-m", "llama", "--plan", "none"], "none: cannot be read"),
        (["edit", "edits.jsonl", "-m", "llama", "--plan", "other.yaml"], "edit 'b' is not among the edits read"),
        (["edit", "edits.jsonl", "-m", "llama", "--rounds", "0"], "--rounds needs --plan"),
        (["edit", "edits.jsonl", "-m", "llama", "--workers", "2"], "are for --engine ray"),
        (["edit", "edits.jsonl", "-m", "llama", "-o", "bad.yaml"], "bad.yaml exists and is not a folder"),
    ),
    "plan": (
        (["plan", "none.jsonl", "-m", "llama"], "none.jsonl: cannot be read"),
        (["plan", "bad.jsonl", "-m", "llama"], "bad.jsonl:1: "),
        (["plan", "edits.jsonl", "-m", "lama"], "--model lama: no such folder or preset"),
        (["plan", "edits.jsonl", "-m", "llama", "--preset", "papr"], "there is: "),
        (["plan", "edits.jsonl", "-m", "llama", "--config", "bad.yaml"], "did you mean steps?"),
        (["plan", "edits.jsonl", "-m", "llama", "-o", "bad.yaml"], "bad.yaml exists"),
    ),
    "eval": (
        (["eval", "none.jsonl", "-m", "llama"], "none.jsonl: cannot be read"),
        (["eval", "bad.jsonl", "-m", "llama"], "bad.jsonl:1: "),
        (["eval", "edits.jsonl", "-m", "lama"], "--model lama: no such folder or preset"),
        (["eval", "edits.jsonl", "-m", "llama", "-a", "none"], "none: no such file"),
        (["eval", "edits.jsonl", "-m", "llama", "-a", "edits.jsonl"], "not a whole safetensors file"),
        (["eval", "edits.jsonl", "-m", "llama", "--texts", "none"], "none: cannot be read"),
        (["eval", "edits.jsonl", "-m", "llama", "--min", "locallity=1"], "did you mean locality?"),
        (["eval", "edits.jsonl", "-m", "llama", "--records", "bad.yaml"], "bad.yaml exists"),
    ),
    "ask": (
        (["ask", "Who?", "-m", "lama"], "--model lama: no such folder or preset"),
        (["ask", "Who?", "-m", "llama", "-a", "none"], "none: no such file"),
        (["ask", "Who?", "-m", "llama", "-a", "edits.jsonl"], "not a whole safetensors file"),
        (["ask", "-m", "llama"], "no prompts"),
    ),
    "merge": (
        (["merge", "none", "-o", "merged"], "none: no such file"),
        (["merge", "edits.jsonl", "-o", "merged"], "not a whole safetensors file"),
        (["merge", "none"], "give the result's file with --output"),
    ),
    "undo": (
        (["undo", "none", "Ada"], "none: no such file"),
        (["undo", "edits.jsonl", "Ada"], "not a whole safetensors file"),
    ),
    "push": ((["push", "none", "org/name"], "none: no such file"),),
    "compact": (
        (["compact", "none", "-m", "llama", "-o", "small"], "none: no such file"),
        (["compact", "none", "-m", "llama"], "give the result's file with --output"),
        (["compact", "none", "-m", "llama", "-o", "bad.yaml"], "bad.yaml exists"),
    ),
    "export": (
        (["export", "lama", "none", "-o", "whole"], "none: no such file"),
        (["export", "llama", "edits.jsonl", "-o", "whole"], "not a whole safetensors file"),
        (["export", "llama", "none"], "Missing option '--output'"),
    ),
    "compare": (
        (["compare", "none.jsonl", "-m", "llama"], "none.jsonl: cannot be read"),
        (["compare", "edits.jsonl", "-m", "lama"], "--model lama: no such folder or preset"),
        (["compare", "edits.jsonl", "-m", "llama", "--presets", "ft,papr"], "there is: "),
    ),
    "study": (
        (["study", "bad.jsonl", "-m", "llama"], "bad.jsonl:1: "),
        (["study", "edits.jsonl", "-m", "lama"], "--model lama: no such folder or preset"),
        (["study", "edits.jsonl", "-m", "llama", "--vary", "stepz=1"], "did you mean steps?"),
    ),
    "show": (
        (["show", "none"], "none: no such file"),
        (["show", "edits.jsonl"], "not a whole safetensors file"),
        (["show", "."], "no such file"),
    ),
}


@pytest.mark.parametrize("name", TOO_SOON)
def test_a_mistake_is_reported_before_anything_heavy_is_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "edits.jsonl").write_text('{"id": "a", "prompt": "Ada is", "target": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Ada is"}\n')
    (tmp_path / "bad.csv").write_text("prompt,target\nAda is\n")
    (tmp_path / "sheet.xlsx").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "bad.yaml").write_text("stepz: 3\n")
    (tmp_path / "other.yaml").write_text("rounds: [[b]]\n")
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from lemoe_cli.main import cli\n"
        "for arguments in json.load(sys.stdin):\n"
        "    result = CliRunner().invoke(cli, arguments)\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    print(json.dumps([arguments, result.exit_code, result.stderr, loaded]))\n"
    )
    given = json.dumps([arguments for arguments, _ in TOO_SOON[name]])
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, input=given, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [said[0] for said in results if said[1] != 2] == []
    assert [said[0] for said in results if said[3]] == []
    expected = [message for _, message in TOO_SOON[name]]
    assert [(said[0], said[2]) for said, message in zip(results, expected, strict=True) if message not in said[2]] == []


def test_plan_shows_rounds_and_writes_a_plan_that_edit_follows(edits: Path, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    result = lemoe_command("plan", edits, "-m", model, "--preset", "paper", "--round-size", "2", "-o", plan)
    assert result.exit_code == 0
    assert "rounds" in result.stdout
    assert "No duplicates or conflicts" in result.stdout
    rounds = yaml.safe_load(plan.read_text())["rounds"]
    plan.write_text(yaml.safe_dump({"rounds": rounds[1:]}))
    result = lemoe_command("edit", edits, "-m", model, *SMALL, "--plan", plan)
    assert result.exit_code == 0
    assert re.search(rf"left out +{len(rounds[0])} not in the plan", result.stdout)
    assert "left out: the plan does not name" in result.stderr
    taught = lemoe.load_adaptor(tmp_path / "edits.lemoe" / "adaptor.safetensors").rounds
    assert [len(record.edits) for record in taught] == [len(members) for members in rounds[1:]]


def test_plan_shows_the_first_of_many_rounds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "ROUNDS_SHOWN", 2)
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(f'{{"prompt": "{name} is", "target": "b"}}\n' for name in ("Ada", "Bo", "Cleo")))
    result = lemoe_command("plan", path, "-m", model, "--preset", "paper", "--round-size", "1")
    assert "3 rounds" in result.stdout
    assert "... and 1 more, all in the plan file (-o)" in result.stdout


def test_plan_reports_edits_that_contradict_each_other(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "A is", "target": "b", "id": "x"}\n{"prompt": "A is", "target": "c", "id": "y"}\n')
    result = lemoe_command("plan", path, "-m", model, "--preset", "paper")
    assert "superseded" in result.stdout
    assert "x: A is -> b" in result.stdout


def test_edit_writes_the_plan_each_round_and_their_stack_next_to_the_edits(
    edits: Path, model: Path, tmp_path: Path
) -> None:
    result = lemoe_command("edit", edits, "--model", model, *SMALL)
    assert result.exit_code == 0
    assert list_files(tmp_path / "edits.lemoe") == {
        "run.yaml",
        "plan.yaml",
        "README.md",
        "rounds",
        *(f"rounds/000{number}.safetensors" for number in (1, 2, 3)),
        "adaptor.safetensors",
    }
    assert "6 edits taught" in result.stdout
    assert "reliability" in result.stdout
    assert result.stderr.splitlines()[0] == f"model: {model}"
    assert "round 3/3" in result.stderr


def test_quiet_leaves_only_the_results(edits: Path, model: Path) -> None:
    result = lemoe_command("edit", edits, "--model", model, *SMALL, "--quiet")
    assert "6 edits taught" in result.stdout
    assert "model:" not in result.stderr
    assert "round 1/3" not in result.stderr


def test_verbose_tells_how_long_each_phase_took(edits: Path, model: Path) -> None:
    result = lemoe_command("edit", edits, "--model", model, *SMALL, "-q", "-v")
    timed = [line.split(maxsplit=3)[3] for line in result.stderr.splitlines() if line.startswith("time: ")]
    assert timed[0] == "reading and checking"
    assert timed[-1] == "all"
    assert [name for name in timed if name == "planning" or name.startswith(("round", "checking"))] == [
        "planning",
        "round 1/3",
        "round 2/3",
        "round 3/3",
        "checking every edit",
    ]


def test_what_plan_edit_and_merge_show_is_there_as_json(edits: Path, model: Path, tmp_path: Path) -> None:
    planned = json.loads(
        lemoe_command("plan", edits, "-m", model, "--preset", "paper", "--round-size", "2", "--json").stdout
    )
    assert sorted(name for members in planned["rounds"] for name in members) == [f"fact-{n}" for n in range(6)]
    taught = json.loads(lemoe_command("edit", edits, "-m", model, *SMALL, "--json").stdout)
    adaptor = tmp_path / "edits.lemoe" / "adaptor.safetensors"
    assert (taught["taught"], taught["rounds"], taught["path"]) == (6, 3, str(adaptor))
    merged = json.loads(lemoe_command("merge", adaptor, "--drop", "3", "--dry-run", "--json").stdout)
    assert (merged["path"], merged["rounds"], merged["edits"]) == (None, 2, 4)
    assert [(edit["round"], edit["id"]) for edit in merged["dropped"]] == [(3, name) for name in planned["rounds"][2]]


def test_nothing_is_coloured_where_colours_are_unwanted() -> None:
    coloured = "import lemoe_cli.ui as ui; ui.results.print('text', style='bold red')"
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-c", coloured]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "\x1b[1;31m" in shown
    environment["NO_COLOR"] = "1"
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "31m" not in shown


def test_settings_of_a_run_come_from_options_over_the_file(edits: Path, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("steps: 2\nlearning_rate: 1e-4\n")
    lemoe_command("edit", edits, "-m", model, "--config", config, *SMALL, "--limit", "2")
    settings = lemoe.load_adaptor(tmp_path / "edits.lemoe" / "adaptor.safetensors").settings
    assert (settings.method, settings.steps, settings.learning_rate) == ("paper", 4, 1e-4)


def test_a_preset_given_as_an_option_wins_over_the_files(edits: Path, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("preset: nonsense\n")
    result = lemoe_command("plan", edits, "-m", model, "--config", config, "--preset", "paper")
    assert result.exit_code == 0


def test_edit_eval_and_merge_work_together(edits: Path, model: Path, tmp_path: Path, adaptor: Path) -> None:
    rounds = sorted((tmp_path / "edits.lemoe" / "rounds").iterdir())
    merged = tmp_path / "merged.safetensors"
    result = lemoe_command("merge", *rounds, "-o", merged)
    assert result.exit_code == 0
    assert "3 adaptors stacked" in result.stdout
    assert merged.read_bytes() == adaptor.read_bytes()
    result = lemoe_command("eval", edits, "-m", model, "-a", merged, "--device", "cpu")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("reliability", "generality", "locality", "round 3"))


def test_merging_edits_of_one_id_says_what_each_teaches(edits: Path, model: Path, tmp_path: Path) -> None:
    arguments = ("-m", model, "--layer", "1", "--steps", "2", "--device", "cpu", "-q")
    for target in ("Rome", "Bergen"):
        (tmp_path / f"{target}.jsonl").write_text(f'{{"id": "e1", "prompt": "Ada lives in", "target": "{target}"}}')
        assert lemoe_command("edit", tmp_path / f"{target}.jsonl", *arguments).exit_code == 0
    parts = (tmp_path / "Rome.lemoe", tmp_path / "Bergen.lemoe")
    said = " ".join(lemoe_command("merge", *parts, "--dry-run").stderr.split())
    expected = "edit e1 (Ada lives in -> Rome) of round 1 is superseded: e1 (Ada lives in -> Bergen) of round 2 answers"
    assert expected in said
    assert "2/e1" in refused_message("merge", *parts, "--dry-run", "--drop", "e1")
    result = lemoe_command("merge", *parts, "--dry-run", "--drop", "2/e1")
    assert "edit e1 (Ada lives in -> Bergen) of round 2 is dropped" in " ".join(result.stderr.split())
    assert re.search(r"edits dropped +1", result.stdout)


def test_edits_that_missed_their_target_are_named_with_what_they_teach(model: Path, tmp_path: Path) -> None:
    (tmp_path / "edits.jsonl").write_text('{"prompt": "Ada lives in", "target": "Rome"}')
    settings = tmp_path / "settings.yaml"
    settings.write_text("steps: 1\nretries: 0\nlearning_rate: 1e-7\n")
    arguments = ("-m", model, "--config", settings, "--layer", "1", "--device", "cpu")
    said = " ".join(lemoe_command("edit", tmp_path / "edits.jsonl", *arguments).stderr.split())
    assert re.search(r"1 edit still missed .*: edit-[0-9a-f]{10} \(Ada lives in -> Rome\)", said)


def test_limit_and_sample_choose_the_edits(edits: Path, model: Path, tmp_path: Path) -> None:
    arguments = ("edit", edits, "-m", model, *SMALL, "--limit", "4", "--sample", "2", "--seed", "1")
    assert "2 edits taught" in lemoe_command(*arguments).stdout
    digests = {edit.digest for edit in lemoe.read_edits(edits)[:4]}
    records = lemoe.load_adaptor(tmp_path / "edits.lemoe" / "adaptor.safetensors").rounds
    assert {digest for record in records for digest in record.edits} < digests


def test_an_adaptor_is_continued_with_from(edits: Path, model: Path, tmp_path: Path) -> None:
    lemoe_command("edit", edits, "-m", model, *SMALL, "--limit", "4", "-o", tmp_path / "one")
    first = tmp_path / "one" / "adaptor.safetensors"
    result = lemoe_command("edit", edits, "-m", model, *SMALL, "--from", first, "-o", tmp_path / "two")
    assert "2 edits taught" in result.stdout
    assert "4 edits are already in the adaptor" in result.stderr
    continued = lemoe.load_adaptor(tmp_path / "two" / "adaptor.safetensors")
    assert continued.rounds[:2] == lemoe.load_adaptor(first).rounds


def test_eval_json_is_one_flat_record_per_metric(edits: Path, model: Path, adaptor: Path) -> None:
    result = lemoe_command("eval", edits, "-m", model, "-a", adaptor, "--device", "cpu", "--json", "--limit", "4")
    document = json.loads(result.stdout)
    assert set(document) == {"schema", "settings", "versions", "metrics", "bars", "tasks"}
    assert document["schema"] == 1
    assert {"edits", "adaptor", "model", "decode", "limit", "device", "dtype"} <= set(document["settings"])
    assert document["versions"]["lemoe"] == lemoe.__version__
    assert {"python", "torch", "transformers"} <= set(document["versions"])
    fields = {"name", "kind", "measure", "decode", "stage", "value", "stderr", "n", "better", "version"}
    assert all(set(metric) == fields for metric in document["metrics"])
    assert {metric["name"] for metric in document["metrics"]} == {"reliability", "generality", "locality", "routing"}
    assert {metric["n"] for metric in document["metrics"] if metric["name"] == "reliability"} == {4}


def test_eval_json_gives_the_librarys_metrics(edits: Path, model: Path, adaptor: Path, base: lemoe.BaseModel) -> None:
    result = lemoe_command("eval", edits, "-m", model, "-a", adaptor, "--device", "cpu", "--json")
    expected = lemoe.evaluate(base, lemoe.load_adaptor(adaptor), lemoe.read_edits(edits))
    shown = {(m["name"], m["measure"], m["kind"], m["stage"]): m["value"] for m in json.loads(result.stdout)["metrics"]}
    for metric in expected.metrics:
        assert shown[metric.name, metric.measure, metric.kind, metric.stage] == pytest.approx(metric.value)


def test_eval_without_an_adaptor_measures_the_base_alone(edits: Path, model: Path) -> None:
    result = lemoe_command("eval", edits, "-m", model, "--json", "-q")
    document = json.loads(result.stdout)
    assert document["settings"]["adaptor"] is None
    assert {metric["stage"] for metric in document["metrics"]} == {"before"}


def test_eval_records_are_one_json_line_per_probe(edits: Path, model: Path, adaptor: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    arguments = ("eval", edits, "-m", model, "-a", adaptor, "--records", path)
    assert lemoe_command(*arguments).exit_code == 0
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 18
    assert {record["name"] for record in records} == {"reliability", "generality", "locality"}
    assert {"edit", "prompt", "expected", "before", "after", "route"} <= set(records[0])
    before = path.read_bytes()
    assert "exists" in refused_message(*arguments)
    assert path.read_bytes() == before
    assert lemoe_command(*arguments, "--force").exit_code == 0


def test_eval_writes_reports_by_their_suffix(edits: Path, model: Path, adaptor: Path, tmp_path: Path) -> None:
    page, short = tmp_path / "report.html", tmp_path / "report.md"
    arguments = ("eval", edits, "-m", model, "-a", adaptor, "-q", "--report", page, "--report", short)
    assert lemoe_command(*arguments).exit_code == 0
    assert "edits.jsonl: lemoe eval" in page.read_text(encoding="utf-8")
    assert "| reliability | token accuracy |" in short.read_text(encoding="utf-8")
    before = page.read_bytes()
    assert "exists" in refused_message(*arguments)
    assert lemoe_command(*arguments, "--force").exit_code == 0
    assert page.read_bytes() == before


def test_a_report_of_another_suffix_is_refused_before_anything_is_loaded(edits: Path, tmp_path: Path) -> None:
    message = refused_message("eval", edits, "-m", "no-such-model", "--report", tmp_path / "report.pdf")
    assert "report.pdf: a report's name ends in .html or .md" in message


def test_a_finished_run_is_refused_before_the_model_is_loaded(edits: Path, adaptor: Path) -> None:
    before = adaptor.read_bytes()
    message = refused_message("edit", edits, "--model", "no-such-model", *SMALL)
    assert "holds a finished run" in message
    assert "--force" in message
    assert adaptor.read_bytes() == before


def test_force_replaces_a_finished_run(edits: Path, model: Path, adaptor: Path) -> None:
    before = adaptor.read_bytes()
    assert lemoe_command("edit", edits, "-m", model, *SMALL, "--seed", "3", "--force").exit_code == 0
    assert adaptor.read_bytes() != before


def test_a_merge_into_an_existing_file_needs_force(adaptor: Path) -> None:
    before = adaptor.read_bytes()
    assert "exists" in refused_message("merge", adaptor, "-o", adaptor)
    assert adaptor.read_bytes() == before
    assert lemoe_command("merge", adaptor, "-o", adaptor, "--force").exit_code == 0
    assert adaptor.read_bytes() == before


@pytest.mark.parametrize("name", ["file/inside", "x" * 300])
def test_a_path_that_cannot_be_written_is_one_clear_message(
    edits: Path, model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    before = list_files(tmp_path)
    assert name[:20] in refused_message("edit", edits, "-m", model, *SMALL, "-q", "-o", tmp_path / name)
    assert list_files(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(edits: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "is not a folder" in refused_message("edit", edits, "-m", model, *SMALL, "-o", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


MISTAKES = {
    "missing edits": (("edit", "none.jsonl", "-m", "llama"), "none.jsonl: cannot be read"),
    "folder of edits": (("edit", ".", "-m", "llama"), "cannot be read"),
    "unknown model": (("edit", "{edits}", "-m", "lama", *SMALL), "--model lama: no such folder or preset"),
    "unknown preset": (("edit", "{edits}", "-m", "{model}", "--preset", "papr"), "there is: "),
    "unknown device": (("plan", "{edits}", "-m", "{model}", "--device", "tpu"), "--device tpu: not available here"),
    "unknown dtype": (("plan", "{edits}", "-m", "{model}", "--dtype", "int3"), "--dtype int3: expected auto"),
    "device and device map": (
        ("plan", "{edits}", "-m", "{model}", "--device", "cpu", "--device-map", "auto"),
        "--device cpu and --device-map exclude each other",
    ),
    "device map with ray": (
        ("edit", "{edits}", "-m", "{model}", "--device-map", "auto", "--engine", "ray"),
        "--device-map is for --engine local",
    ),
    "layer too high": (("edit", "{edits}", "-m", "{model}", *SMALL, "--layer", "9"), "layers 0 to 2"),
    "wrong layer path": (("edit", "{edits}", "-m", "{model}", *SMALL, "--layer-path", "ffn"), "Candidates: mlp"),
    "missing adaptor to measure": (("eval", "{edits}", "-m", "{model}", "-a", "none"), "none: no such file"),
    "missing adaptor to continue": (("edit", "{edits}", "-m", "{model}", *SMALL, "--from", "none"), "no such file"),
    "missing adaptor to merge": (("merge", "none", "-o", "merged"), "none: no such file"),
    "missing plan": (("edit", "{edits}", "-m", "{model}", *SMALL, "--plan", "none"), "none: cannot be read"),
    "bad plan": (("edit", "{edits}", "-m", "{model}", *SMALL, "--plan", "{edits}"), "edits.jsonl"),
    "rounds without a plan": (("edit", "{edits}", "-m", "{model}", "--rounds", "0"), "--rounds needs --plan"),
    "rounds backwards": (("edit", "{edits}", "-m", "{model}", "--plan", "none", "--rounds", "3-1"), "'3-1' is neither"),
    "rounds of another kind": (
        ("edit", "{edits}", "-m", "{model}", "--plan", "none", "--rounds", "a"),
        "'a' is neither",
    ),
    "workers without ray": (("edit", "{edits}", "-m", "{model}", "--workers", "2"), "are for --engine ray"),
    "dependent rounds": (
        ("edit", "{edits}", "-m", "{model}", *SMALL, "--plan", "none", "--rounds", "1-2"),
        "--rounds must start at 0 with preset paper",
    ),
    "missing settings": (("edit", "{edits}", "-m", "{model}", "--config", "none"), "none: cannot be read"),
    "bad settings": (("edit", "{edits}", "-m", "{model}", "--config", "{config}"), "did you mean steps?"),
    "no model": (("edit", "{edits}"), "--model"),
    "steps below one": (("edit", "{edits}", "-m", "{model}", "--steps", "0"), "--steps"),
    "learning rate of zero": (("edit", "{edits}", "-m", "{model}", "--learning-rate", "0"), "learning_rate"),
    "merge of nothing": (("merge", "-o", "merged"), "ADAPTOR"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_message_code_2_and_nothing_half_written(
    edits: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "settings.yaml"
    config.write_text("stepz: 3\n")
    arguments, expected = MISTAKES[mistake]
    before = list_files(tmp_path)
    assert expected in refused_message(*(text.format(edits=edits, model=model, config=config) for text in arguments))
    assert list_files(tmp_path) == before


def test_an_adaptor_of_another_base_is_refused_with_the_differences(
    edits: Path, adaptor: Path, tiny_folder: Callable[[str], Path]
) -> None:
    message = refused_message("eval", edits, "-m", tiny_folder("gpt2"), "-a", adaptor, "-q")
    assert "made for another base model" in message
    assert "architecture: LlamaForCausalLM != GPT2LMHeadModel" in message


def stop_at_round(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def train_or_stop(*args: Any, **kwargs: Any) -> lemoe.AdaptorState:
        begun.append(1)
        if len(begun) == number:
            raise error
        return train_round(*args, **kwargs)

    monkeypatch.setattr(local, "train_round", train_or_stop)


def test_ctrl_c_ends_with_130_keeps_finished_rounds_and_says_how_to_go_on(
    edits: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_at_round(2, KeyboardInterrupt(), patched)
        result = lemoe_command("edit", edits, "-m", model, *SMALL)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert list_files(tmp_path / "edits.lemoe") == {"run.yaml", "plan.yaml", "rounds", "rounds/0001.safetensors"}
    assert "--resume" in refused_message("edit", edits, "-m", model, *SMALL)
    resumed = lemoe_command("edit", edits, "-m", model, *SMALL, "--resume")
    assert resumed.exit_code == 0
    assert "kept from the unfinished run" in resumed.stderr


def test_running_out_of_memory_says_what_to_lower(edits: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_round(1, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), monkeypatch)
    assert "out of memory; lower --batch-tokens" in refused_message("edit", edits, "-m", model, *SMALL, "-q")


def test_a_missing_ray_is_named_before_the_model_is_loaded(
    edits: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_base", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lemoe.runs.engines.ray", raising=False)
    assert "pip install 'lemoe[ray]'" in refused_message("edit", edits, "-m", model, *SMALL, "--engine", "ray")


def test_a_bug_of_ours_is_not_hidden(edits: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_round(1, ZeroDivisionError("a bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        lemoe_command("edit", edits, "-m", model, *SMALL)
