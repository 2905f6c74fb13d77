"""Two workers of Ray against one process, each on one core: the speed-up, the same bytes, and workers that are killed.

    python tests/benchmarks/engines.py [--rounds 40] [--round-size 20] [--kills 5]

The reference is what two processes with nothing to share reach: matrix products on one core, then on both at once.
"""

import argparse
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
from speed import read_real_edits

import lemoe
from lemoe.adaptor.state import RoundRecord
from lemoe.runs.engines.ray import RayEngine
from lemoe.runs.progress import NullProgress

CORES = sorted(os.sched_getaffinity(0))[:2]


class RoundClock(NullProgress):
    """When each round was done, seconds from now on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.done: list[float] = []

    def round_done(self, number: int, total: int, record: RoundRecord, *, kept: bool) -> None:
        self.done.append(time.monotonic() - self._began)


def measure_matmul_rate(core: int, seconds: float = 5.0) -> float:
    """Operations per second of matrix products on one core."""
    import torch

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    one = torch.randn(576, 1536)
    other = torch.randn(1536, 576)
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        one @ other
        count += 1
    return 2 * 576 * 576 * 1536 * count / seconds


def measure_ideal_speedup() -> float:
    """How much more two cores do than one."""
    with get_context("spawn").Pool(2) as pool:
        alone = pool.apply(measure_matmul_rate, (CORES[0],))
        return sum(pool.map(measure_matmul_rate, CORES, chunksize=1)) / alone


def find_workers() -> list[psutil.Process]:
    """The Ray workers of this run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RoundWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def pin_workers(stop: threading.Event) -> None:
    """Keep each worker on one core; finding them takes time, so it is done rarely once all of them are found."""
    there: list[psutil.Process] = []
    while not stop.wait(0.2 if len(there) < len(CORES) else 10):
        there = sorted(find_workers(), key=lambda process: process.pid)
        for core, process in zip(CORES, there, strict=False):
            with suppress(psutil.Error):
                process.cpu_affinity([core])


def kill_workers(stop: threading.Event, kills: int, killed: list[float]) -> None:
    """Kill a random worker with -9 every 5 to 12 seconds, `kills` times."""
    rng, began = random.Random(0), time.monotonic()
    while len(killed) < kills and not stop.wait(rng.uniform(5, 12)):
        if there := find_workers():
            with suppress(psutil.Error):
                rng.choice(there).kill()
                killed.append(time.monotonic() - began)


def run_with_helper(work: Callable[[], object], helper: Callable[[threading.Event], None]) -> None:
    """Run `work`, and `helper` in a thread until `work` ends."""
    stop = threading.Event()
    thread = threading.Thread(target=helper, args=(stop,))
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()


def read_round_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def format_timeline(name: str, clock: RoundClock) -> str:
    marks = [clock.done[len(clock.done) * part // 4 - 1] for part in (1, 2, 3, 4)]
    return f"| {name} | {clock.done[0]:.1f} s | {' | '.join(f'{mark:.1f} s' for mark in marks)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--round-size", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    given = parser.parse_args()
    bound = measure_ideal_speedup()
    base = lemoe.load_base("llama")
    edits = read_real_edits(given.rounds * given.round_size)
    settings = lemoe.resolve_settings("anchor", None, {"round_size": given.round_size})
    engine = RayEngine(partial(lemoe.load_base, "llama"), workers=len(CORES))
    print("| run | first round done | a quarter | half | three quarters | all |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.sched_setaffinity(0, {CORES[0]})
        local = RoundClock()
        lemoe.edit(base, edits, root / "local", settings, progress=local)
        print(format_timeline("one process", local), flush=True)
        os.sched_setaffinity(0, CORES)
        ray = RoundClock()
        run_with_helper(
            lambda: lemoe.edit(base, edits, root / "ray", settings, engine=engine, progress=ray), pin_workers
        )
        print(format_timeline("two workers", ray), flush=True)
        killed: list[float] = []
        hurt = RoundClock()
        run_with_helper(
            lambda: lemoe.edit(base, edits, root / "hurt", settings, engine=engine, progress=hurt),
            lambda stop: kill_workers(stop, given.kills, killed),
        )
        print(format_timeline(f"{len(killed)} killed", hurt), flush=True)
        expected = read_round_files(root / "local")
        same = [read_round_files(root / name) == expected for name in ("ray", "hurt")]
    whole, steady = local.done[-1] / ray.done[-1], _seconds_per_round(local) / _seconds_per_round(ray)
    print(f"\n{whole:.2f} times as fast, {steady:.2f} from the first round on (threshold 1.7);")
    print(f"two cores multiply matrices {bound:.2f} times as fast as one. Killed at {[round(at) for at in killed]} s.")
    print(f"Files equal to those of one process: {same[0]}; with kills: {same[1]}")
    if not all(same) or len(killed) < given.kills:
        raise SystemExit(1)


def _seconds_per_round(clock: RoundClock) -> float:
    """Seconds per round after the first one, when all workers have started."""
    return (clock.done[-1] - clock.done[0]) / (len(clock.done) - 1)


if __name__ == "__main__":
    main()
