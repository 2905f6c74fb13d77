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
from speed import real_edits

import lemoe
from lemoe.adaptor.state import RoundRecord
from lemoe.runs.engines.ray import RayEngine
from lemoe.runs.progress import Silent

CORES = sorted(os.sched_getaffinity(0))[:2]


class Clock(Silent):
    """When each round was done, seconds from now on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.done: list[float] = []

    def round_done(self, number: int, of: int, record: RoundRecord, *, kept: bool) -> None:
        self.done.append(time.monotonic() - self._began)


def products(core: int, seconds: float = 5.0) -> float:
    """Operations a second of matrix products on one core."""
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


def ceiling() -> float:
    """How much more two cores do than one."""
    with get_context("spawn").Pool(2) as pool:
        alone = pool.apply(products, (CORES[0],))
        return sum(pool.map(products, CORES, chunksize=1)) / alone


def workers() -> list[psutil.Process]:
    """Those of this run that train, or load the base."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RoundWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def pin(stop: threading.Event) -> None:
    """Keep each worker on one core; looking for them takes time, so that it is done rarely once they are there."""
    there: list[psutil.Process] = []
    while not stop.wait(0.2 if len(there) < len(CORES) else 10):
        there = sorted(workers(), key=lambda process: process.pid)
        for core, process in zip(CORES, there, strict=False):
            with suppress(psutil.Error):
                process.cpu_affinity([core])


def kill(stop: threading.Event, kills: int, killed: list[float]) -> None:
    """Kill a worker with -9 every now and then, `kills` times."""
    rng, began = random.Random(0), time.monotonic()
    while len(killed) < kills and not stop.wait(rng.uniform(5, 12)):
        if there := workers():
            with suppress(psutil.Error):
                rng.choice(there).kill()
                killed.append(time.monotonic() - began)


def with_helper(work: Callable[[], object], helper: Callable[[threading.Event], None]) -> None:
    """`work`, with `helper` beside it until it ends."""
    stop = threading.Event()
    thread = threading.Thread(target=helper, args=(stop,))
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def timeline(name: str, clock: Clock) -> str:
    marks = [clock.done[len(clock.done) * part // 4 - 1] for part in (1, 2, 3, 4)]
    return f"| {name} | {clock.done[0]:.1f} s | {' | '.join(f'{mark:.1f} s' for mark in marks)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--round-size", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    given = parser.parse_args()
    bound = ceiling()
    base = lemoe.load_base("llama")
    edits = real_edits(given.rounds * given.round_size)
    settings = lemoe.resolve_settings("anchor", None, {"round_size": given.round_size})
    engine = RayEngine(partial(lemoe.load_base, "llama"), workers=len(CORES))
    print("| run | first round done | a quarter | half | three quarters | all |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        os.sched_setaffinity(0, {CORES[0]})
        local = Clock()
        lemoe.edit(base, edits, settings, here / "local", listener=local)
        print(timeline("one process", local), flush=True)
        os.sched_setaffinity(0, CORES)
        ray = Clock()
        with_helper(lambda: lemoe.edit(base, edits, settings, here / "ray", engine=engine, listener=ray), pin)
        print(timeline("two workers", ray), flush=True)
        killed: list[float] = []
        hurt = Clock()
        with_helper(
            lambda: lemoe.edit(base, edits, settings, here / "hurt", engine=engine, listener=hurt),
            lambda stop: kill(stop, given.kills, killed),
        )
        print(timeline(f"{len(killed)} killed", hurt), flush=True)
        expected = files_of(here / "local")
        same = [files_of(here / name) == expected for name in ("ray", "hurt")]
    whole, steady = local.done[-1] / ray.done[-1], _steady(local) / _steady(ray)
    print(f"\n{whole:.2f} times as fast, {steady:.2f} from the first round on (bar 1.7);")
    print(f"two cores multiply matrices {bound:.2f} times as fast as one. Killed at {[round(at) for at in killed]} s.")
    print(f"Files equal to those of one process: {same[0]}; with kills: {same[1]}")
    if not all(same) or len(killed) < given.kills:
        raise SystemExit(1)


def _steady(clock: Clock) -> float:
    """Seconds a round once workers are there."""
    return (clock.done[-1] - clock.done[0]) / (len(clock.done) - 1)


if __name__ == "__main__":
    main()
