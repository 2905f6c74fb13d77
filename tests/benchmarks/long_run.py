"""A long run with one adaptor: plan, edit, eval and merge of many ZsRE-size edits, as a user runs them.

    python tests/benchmarks/long_run.py --edits 17000 --folder long

Real edits first, then real questions about made-up names. Each phase is a process of its own, whose seconds and peak
memory are written to FOLDER/phases.json as it ends; a script that is started again goes on where it stopped, within the
training too. What an edit costs is shown for the first rounds and for the last ones.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from synthetic import make_renamed_edits

import lemoe
from lemoe.adaptor.checkpoint import AdaptorFile

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
SHARE = 10  # first and last tenth of the rounds


@dataclass(frozen=True)
class Phase:
    """A command that ended: `seconds` of its last start, `memory` its peak resident set, bytes."""

    seconds: float
    memory: int


def make_zsre_edits(count: int) -> list[lemoe.Edit]:
    real = [*lemoe.read_edits(DATA / "zsre_mend_edit.json"), *lemoe.read_edits(DATA / "zsre_dev.json")]
    return [*real[:count], *make_renamed_edits(real, max(0, count - len(real)))]


def write_edits(edits: Iterable[lemoe.Edit], path: Path) -> None:
    """Write the documented keys, one object per line."""
    with path.open("w", encoding="utf-8") as file:
        for edit in edits:
            fields = {"id": edit.id, "prompt": edit.prompt, "target": edit.target, "subject": edit.subject}
            probes = {"rephrases": edit.rephrases, "locality": edit.locality}
            record = {**fields, **{name: [asdict(probe) for probe in each] for name, each in probes.items()}}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def run_command(arguments: Sequence[object], output: Path) -> Phase:
    """One `lemoe` command in a process of its own, its stdout in `output`."""
    words = [sys.executable, "-m", "lemoe_cli.main", *map(str, arguments)]
    started = time.monotonic()
    with output.open("wb") as file:
        child = os.posix_spawn(
            sys.executable, words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1)]
        )
        _, status, used = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(words)}: ended with {os.waitstatus_to_exitcode(status)}")
    return Phase(time.monotonic() - started, used.ru_maxrss << 10)


def phase_commands(folder: Path) -> dict[str, list[object]]:
    """The commands, in order."""
    edits, plan, run_folder = folder / "edits.jsonl", folder / "plan.yaml", folder / "run"
    model = ("--model", "llama", "--quiet")
    rounds = sorted(run_folder.glob("rounds/*.safetensors"))
    adaptor = folder / "merged.safetensors"
    return {
        "plan": ["plan", edits, *model, "--output", plan, "--force"],
        "edit": ["edit", edits, *model, "--plan", plan, "--output", run_folder, "--resume"],
        "merge": ["merge", *rounds, "--output", adaptor, "--quiet", "--force"],
        "eval": ["eval", edits, *model, "--adaptor", adaptor, "--json"],
        "eval-on-demand": ["eval", edits, *model, "--adaptor", adaptor, "--expert-cache", "8M", "--json"],
    }


def seconds_per_edit(folder: Path) -> tuple[float, float]:
    """Seconds per edit in the first and in the last rounds, from the modification times of their files."""
    files = sorted((folder / "run" / "rounds").glob("*.safetensors"))
    times = [file.stat().st_mtime for file in files]
    sizes = [len(AdaptorFile(file).state.rounds[0].edits) for file in files]
    few = max(1, len(files) // SHARE)
    first = (times[few] - times[0]) / sum(sizes[1 : few + 1])
    return first, (times[-1] - times[-1 - few]) / sum(sizes[-few:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=17_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--phases", default="plan,edit,merge,eval", help="comma separated")
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "edits.jsonl").exists():
        write_edits(make_zsre_edits(given.edits), folder / "edits.jsonl")
    notes = folder / "phases.json"
    done: dict[str, Phase] = {}
    if notes.exists():
        done = {name: Phase(**phase) for name, phase in json.loads(notes.read_text()).items()}
    for name in given.phases.split(","):
        if name not in done:
            done[name] = run_command(phase_commands(folder)[name], folder / f"{name}.out")
            notes.write_text(json.dumps({name: asdict(phase) for name, phase in done.items()}))
    print("| phase | seconds | ms an edit | peak memory |\n|---|---|---|---|")
    for name, phase in done.items():
        each = 1e3 * phase.seconds / given.edits
        print(f"| {name} | {phase.seconds:.0f} | {each:.1f} | {phase.memory / (1 << 30):.2f} GiB |")
    first, last = seconds_per_edit(folder)
    print(f"\ntraining: {1e3 * first:.0f} ms an edit in the first tenth of the rounds, {1e3 * last:.0f} in the last")


if __name__ == "__main__":
    main()
