"""What order planning costs as edits grow in number, and how much better than chance its rounds are.

    python tests/benchmarks/planning.py                    # 1,000, 10,000 and 100,000 edits
    python tests/benchmarks/planning.py --edits 1000000    # about five gigabytes above the loaded base

The edits are real questions about made-up names, one in four about a name that was asked about before; their vectors
come from the embedding layer of the model. Seconds are those of the whole of `lemoe.plan`. Reads the real edits in
../shared/data where they are there, else examples/edits.jsonl.
"""

import argparse
import time

import psutil
from speed import PeakMemory, read_real_edits
from synthetic import make_renamed_edits

import lemoe

AGAIN = 0.25  # share of edits about a name that has one already


def measure_plan(base: lemoe.BaseModel, edits: list[lemoe.Edit], settings: lemoe.Settings) -> str:
    process = psutil.Process()
    resident = process.memory_info().rss
    started = time.perf_counter()
    with PeakMemory(process) as peak:
        planned = lemoe.plan(base, edits, settings)
    seconds = time.perf_counter() - started
    chosen, drawn = planned.similarity["planned"], planned.similarity["random"]
    return (
        f"| {len(edits):,} | {len(planned.rounds):,} | {seconds:.1f} | {1e3 * seconds / len(edits):.2f} "
        f"| {(peak.bytes - resident) / 2**20:,.0f} | {chosen.within:.3f} / {chosen.between:.3f} "
        f"| {drawn.within:.3f} / {drawn.between:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--round-size", type=int)
    given = parser.parse_args()
    base = lemoe.load_base("llama")
    asked = {} if given.round_size is None else {"round_size": given.round_size}
    settings = lemoe.resolve_settings("anchor", None, asked)
    made = list(make_renamed_edits(read_real_edits(3000), max(given.edits), crowded=True, again=AGAIN))
    lemoe.plan(base, made[:200], settings)
    print("| edits | rounds | s | ms per edit | peak, MiB | planned: within / between | random |")
    print("|---|---|---|---|---|---|---|")
    for count in given.edits:
        print(measure_plan(base, made[:count], settings), flush=True)


if __name__ == "__main__":
    main()
