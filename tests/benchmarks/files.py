"""What files cost: bytes per edit, and the memory in which many of them are merged.

    python tests/benchmarks/files.py [--files 500] [--edits 20] [--hidden 4096]

Round files of random experts are written at the given shape (4096 is a 7B model's width), then merged by a process of
its own, whose peak resident memory is reported above what it held once it had merged one file, beside the size of one
expert and of all anchors and records in memory.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from speed import PeakMemory

from lemoe.adaptor.checkpoint import AdaptorFile, save_adaptor
from lemoe.adaptor.experts import Experts
from lemoe.adaptor.merging import merge_adaptors
from lemoe.adaptor.state import AdaptorState, RoundRecord
from lemoe.base.fingerprint import Fingerprint
from lemoe.data.edits import combine_digests
from lemoe.routing.anchor.anchors import Anchors
from lemoe.routing.anchor.gate import Anchor
from lemoe.settings import resolve_settings

WIDTH = 4
SHAPES = {"embedded model": 576, "7B": 4096}
KIB, MIB = 1 << 10, 1 << 20


def synthetic_state(number: int, edits: int, hidden: int) -> AdaptorState:
    """A round of random experts, with anchors as long as ZsRE's."""
    rng = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    up, down, gate = (torch.randn(edits * WIDTH, hidden, generator=generator) for _ in range(3))
    hashes = dict.fromkeys(("ffn_sha256", "weights_sha256", "tokenizer_sha256"), "0" * 64)
    base = Fingerprint(
        "m", None, "LlamaForCausalLM", 28, "model.layers.28.mlp", hidden, 4 * hidden, True, 49152, **hashes
    )
    digests = tuple(f"{rng.getrandbits(256):064x}" for _ in range(edits))
    names = tuple(f"edit-{number}-{index}" for index in range(edits))
    record = RoundRecord(
        f"{rng.getrandbits(256):064x}",
        None,
        1,
        edits,
        names,
        digests,
        combine_digests(digests),
        0,
        0.0,
        0.0,
        30,
        0,
        (),
        edits,
        prompts=tuple(f"What is the name of the place where person {rng.getrandbits(36):09x} was born?" for _ in names),
        targets=tuple(f"town {rng.getrandbits(32):08x}" for _ in names),
    )
    anchors = tuple(
        Anchor(tuple(rng.randrange(49152) for _ in range(13)), tuple(rng.randrange(49152) for _ in range(4)), name)
        for name in names
    )
    offsets = torch.arange(edits + 1) * WIDTH
    experts = Experts(up, down, gate, offsets, torch.ones(edits))
    return AdaptorState(base, replace(resolve_settings(), layer=28), (record,), experts, Anchors.from_anchors(anchors))


def print_sizes(folder: Path, edits: int) -> None:
    """Print bytes per edit at each shape and type."""
    print("| shape | float32 | bfloat16 |\n|---|---|---|")
    for name, hidden in SHAPES.items():
        state = synthetic_state(0, edits, hidden)
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            path = folder / f"{hidden}-{dtype}.safetensors"
            save_adaptor(replace(state, experts=state.experts.to_dtype(dtype)), path)
            cells.append(f"{path.stat().st_size / edits / KIB:.2f} KiB")
        print(f"| {name}, width {hidden} | {' | '.join(cells)} |")


def measure_merge(folder: Path, output: Path) -> None:
    """Merge the files in `folder`; print the bytes above merging one: at the peak, and for opening them."""
    paths = sorted(folder.glob("*.safetensors"))
    merge_adaptors(paths[:1], output)
    process = psutil.Process()
    before = process.memory_info().rss
    opened = [AdaptorFile(path) for path in paths]
    anchors = process.memory_info().rss - before
    del opened
    with PeakMemory(process) as peak:
        merge_adaptors(paths, output, overwrite=True)
    print(json.dumps({"anchors": anchors, "peak": peak.bytes - before, "file": output.stat().st_size}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.merge:
        measure_merge(given.merge, given.merge / "merged" / "adaptor.safetensors")
        return
    with tempfile.TemporaryDirectory() as scratch:
        print_sizes(Path(scratch), given.edits)
        rounds = Path(scratch) / "rounds"
        for number in range(given.files):
            save_adaptor(synthetic_state(number, given.edits, given.hidden), rounds / f"{number:05d}.safetensors")
        command = [sys.executable, __file__, "--merge", str(rounds)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(run.stdout)
    expert = 3 * WIDTH * given.hidden * 4
    print(f"\nmerging {given.files} files of {given.edits} edits, {found['file'] / MIB:.0f} MiB in all:")
    print(f"one expert {expert / KIB:.0f} KiB, all anchors and records in memory {found['anchors'] / MIB:.1f} MiB")
    ratio = found["peak"] / (expert + found["anchors"])
    print(f"peak memory above the start {found['peak'] / MIB:.1f} MiB, {ratio:.2f} times both (bar 1.2)")


if __name__ == "__main__":
    main()
