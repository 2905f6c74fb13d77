"""Kill runs with -9 at random moments, resume each until it ends, and compare the files with a run never killed.

    python tests/benchmarks/crash.py --kills 50

A tiny random Llama is trained on 20 rounds, each start of a run in a child process. Ends non-zero if a file differs, or
if a finished round was trained again.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked, and a pool of threads does not survive that
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import build_model

import lemoe

ROUNDS, ROUND_SIZE = 20, 2
NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jan")
CITIES = ("Rome", "Oslo", "Lima", "Kyoto", "Quito")


def make_edits() -> list[lemoe.Edit]:
    people = [f"{first} {last}stone" for last in NAMES[:4] for first in NAMES]
    return [
        lemoe.Edit(f"The city where {person} lives is", CITIES[number % len(CITIES)], person, id=f"edit-{number}")
        for number, person in enumerate(people[: ROUNDS * ROUND_SIZE])
    ]


def run_edit(base: lemoe.BaseModel, folder: Path, *, resume: bool) -> None:
    settings = lemoe.resolve_settings(
        "anchor", None, {"layer": 1, "steps": 6, "round_size": ROUND_SIZE, "variants": 2, "negatives": 2}
    )
    lemoe.edit(base, make_edits(), folder, settings, lemoe.EditOptions(resume=resume))


def run_child(base: lemoe.BaseModel, folder: Path, seconds: float | None) -> bool:
    """Resume the run in a child process, killed after so many seconds; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            run_edit(base, folder, resume=True)
            os._exit(0)
        except BaseException as error:  # a forked child must not return into its parent's code
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run ended with an error")
    return os.WIFEXITED(status)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def list_finished_rounds(folder: Path) -> dict[Path, int]:
    """The finished rounds, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("rounds/[0-9]*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many runs are killed, each once")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = lemoe.load_base(str(build_model(root / "model", "llama")), device="cpu")
        started = time.monotonic()
        run_child(base, root / "whole", None)
        seconds = time.monotonic() - started
        expected = read_files(root / "whole")
        at: list[int] = []
        for number in range(given.kills):
            folder = root / f"run-{number}"
            run_child(base, folder, rng.uniform(0, seconds))
            before = list_finished_rounds(folder)
            at.append(len(before))
            run_child(base, folder, None)
            lost = [path.name for path, written in before.items() if path.stat().st_mtime_ns != written]
            if read_files(folder) != expected or lost:
                raise SystemExit(f"run {number}, killed after {len(before)} rounds, differs; trained again: {lost}")
        print(f"{given.kills} of {given.kills} runs of {ROUNDS} rounds end bit-identical, 0 rounds lost")
        print(f"killed after {min(at)} to {max(at)} rounds")


if __name__ == "__main__":
    main()
