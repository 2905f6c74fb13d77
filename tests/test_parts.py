"""Parts of a plan that are trained apart, and what they give when they are merged."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import find_block

import lemoe
from lemoe.adaptor.merging import merge_adaptors
from lemoe.data.edits import Round
from lemoe.errors import InputError
from lemoe.runs.edit import _round_path
from lemoe.runs.progress import NullProgress

SettingsOf = Callable[..., lemoe.Settings]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Six facts in four rounds."""
    path = tmp_path / "plan.yaml"
    path.write_text("rounds: [[fact-5], [fact-2, fact-0], [fact-1, fact-3], [fact-4]]")
    return path


def test_parts_merged_are_the_adaptor_of_one_run_byte_for_byte(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    whole = lemoe.edit(base, facts, tmp_path / "whole", anchor(), lemoe.EditOptions(plan_file=plan))
    parts = (range(1), range(1, 3), range(3, 4))
    paths = [
        lemoe.edit(
            base, facts, tmp_path / f"part-{n}", anchor(), lemoe.EditOptions(plan_file=plan, round_range=round_range)
        ).path
        for n, round_range in enumerate(parts)
    ]
    merge_adaptors(paths, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.path.read_bytes()
    rounds = sorted(path.name for path in (tmp_path / "part-1" / "rounds").iterdir())
    assert rounds == ["0002.safetensors", "0003.safetensors"]


@pytest.mark.parametrize(("of", "name"), [(40, "0007.safetensors"), (12_000, "00007.safetensors")])
def test_names_of_rounds_sort_as_their_numbers_do(of: int, name: str) -> None:
    assert _round_path(Path("run"), Round(7, of, [])) == Path("run", "rounds", name)


class RecordedProgress(NullProgress):
    def planned(self, rounds: int, edits: int) -> None:
        self.expected = (rounds, edits)

    def edits_checked(self, done: int, total: int) -> None:
        self.checked = (done, total)


def test_a_part_says_how_much_it_has_to_do_itself(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    progress = RecordedProgress()
    lemoe.edit(
        base,
        facts,
        tmp_path / "part",
        anchor(),
        lemoe.EditOptions(plan_file=plan, round_range=range(1, 3)),
        progress=progress,
    )
    assert progress.expected == (2, 4)
    assert progress.checked == (4, 4)


def test_a_part_is_resumed_round_by_round(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    report = lemoe.edit(base, facts, part, anchor(), lemoe.EditOptions(plan_file=plan, round_range=range(1, 3)))
    whole = report.path.read_bytes()
    report.path.unlink()
    kept, lost = (part / "rounds" / name for name in ("0002.safetensors", "0003.safetensors"))
    lost.unlink()
    written = kept.stat().st_mtime_ns
    lemoe.edit(base, facts, part, anchor(), lemoe.EditOptions(plan_file=plan, round_range=range(1, 3), resume=True))
    assert report.path.read_bytes() == whole
    assert kept.stat().st_mtime_ns == written


def test_a_forced_part_leaves_no_other_rounds(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    for round_range in (range(2), range(1, 2)):
        lemoe.edit(
            base,
            facts,
            tmp_path / "part",
            anchor(),
            lemoe.EditOptions(plan_file=plan, round_range=round_range, force=True),
        )
    assert [path.name for path in (tmp_path / "part" / "rounds").iterdir()] == ["0002.safetensors"]


def test_parts_that_continue_an_adaptor_keep_the_plans_round_numbers(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    start = lemoe.train_round(base, facts[5:], anchor())  # all of round 0
    whole = lemoe.edit(base, facts, tmp_path / "whole", anchor(), lemoe.EditOptions(plan_file=plan, start=start))
    paths = [
        lemoe.edit(
            base,
            facts,
            tmp_path / f"{n}",
            anchor(),
            lemoe.EditOptions(plan_file=plan, round_range=round_range, start=start),
        ).path
        for n, round_range in enumerate((range(2), range(2, 4)))
    ]
    merge_adaptors(paths, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("round_range", [range(3, 5), range(4, 5), range(-1, 1), range(2, 2)])
def test_rounds_that_the_plan_does_not_have_are_refused(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], anchor: SettingsOf, plan: Path, tmp_path: Path, round_range: range
) -> None:
    with pytest.raises(InputError, match=r"is not in it: it has rounds 0 to 3$"):
        lemoe.edit(base, facts, tmp_path / "part", anchor(), lemoe.EditOptions(plan_file=plan, round_range=round_range))
    assert not (tmp_path / "part").exists()


def test_dependent_rounds_start_at_the_first_and_go_on_from_what_is_there(
    base: lemoe.BaseModel, facts: list[lemoe.Edit], paper: SettingsOf, plan: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="must start at 0 with preset paper"):
        lemoe.edit(base, facts, tmp_path / "part", paper(), lemoe.EditOptions(plan_file=plan, round_range=range(2, 4)))
    whole = lemoe.edit(base, facts, tmp_path / "whole", paper(), lemoe.EditOptions(plan_file=plan))
    first = lemoe.edit(
        base, facts, tmp_path / "first", paper(), lemoe.EditOptions(plan_file=plan, round_range=range(2))
    )
    rest = lemoe.edit(
        base,
        facts,
        tmp_path / "rest",
        paper(),
        lemoe.EditOptions(plan_file=plan, round_range=range(4), start=first.state),
    )
    assert rest.path.read_bytes() == whole.path.read_bytes()


def test_the_array_job_of_the_page_on_long_runs_trains_its_parts(
    facts: list[lemoe.Edit], plan: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    printed = find_block("docs/runs.md", "tested: parts").code
    script = printed.replace("* 5", "* 2").replace("+ 4", "+ 1")  # four rounds, two tasks
    assert script != printed
    script = script.replace("--model llama", f"--model '{tiny_folder('llama')}' --layer 1 --steps 2 --device cpu")
    command = tmp_path / "lemoe"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lemoe_cli.main "$@"\n')
    command.chmod(0o755)
    lines = [f'{{"id": "{e.id}", "prompt": "{e.prompt}", "target": "{e.target}"}}\n' for e in facts]
    (tmp_path / "edits.jsonl").write_text("".join(lines))
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SLURM_CPUS_PER_TASK": "1",
    }
    done = subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, **environment, "SLURM_ARRAY_TASK_ID": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rounds = lemoe.load_adaptor(tmp_path / "part-001").rounds
    assert [record.ids for record in rounds] == [("fact-1", "fact-3"), ("fact-4",)]
