"""Decoding with experts that stay in their file, against the same adaptor in memory.

    python tests/benchmarks/expert_cache.py [--edits 10000] [--share 0.05]

Prompts ask edits drawn at random, each as likely as the other, so that a share of the experts in memory serves the same
share of the prompts. Both adaptors answer the same prompts in turn; the file lies in the page cache of the machine.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from speed import random_adaptor, read_real_edits, synthetic_anchors

import lemoe

TOKENS = 24
LENGTH = 10  # tokens of a prompt


def time_batches(base: lemoe.BaseModel, prompts: list[torch.Tensor]) -> list[float]:
    """Seconds of prefill and decode for each batch of prompts."""
    options = {"do_sample": False, "pad_token_id": base.pad_token_id, "eos_token_id": None}
    seconds = []
    for ids in prompts:
        started = time.perf_counter()
        base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options
        )
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--batches", type=int, default=24)
    given = parser.parse_args()
    base = lemoe.load_base("llama")
    settings = lemoe.resolve_settings("anchor", None, {"variants": 0, "negatives": 0, "steps": 2, "retries": 0})
    edits = read_real_edits(2000)
    taught = lemoe.train_round(base, edits[:20], settings)
    anchors, _ = synthetic_anchors(base, edits, given.edits)
    own = [anchor.prompt[-LENGTH:] for anchor in anchors.anchors if len(anchor.prompt) >= LENGTH]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adaptor.safetensors"
        lemoe.save_adaptor(random_adaptor(base, taught, anchors), path)
        whole = lemoe.load_adaptor(path)
        budget = int(given.share * whole.experts.nbytes)
        print(f"{given.edits:,} experts, {whole.experts.nbytes >> 20} MiB; {budget >> 20} MiB of them are cached\n")
        print("| batch | in memory | on demand | ratio |\n|---|---|---|---|")
        for size in (1, 32):
            rng = random.Random(size)
            prompts = [torch.tensor(rng.sample(own, size)) for _ in range(given.batches)]
            times: dict[str, list[float]] = {"memory": [], "file": []}
            for half in (prompts[: given.batches // 2], prompts[given.batches // 2 :]):
                with lemoe.insert(base, whole):
                    times["memory"] += time_batches(base, half)
                with lemoe.insert(base, path, expert_cache=budget):
                    times["file"] += time_batches(base, half)
            memory, file = (statistics.median(each) for each in times.values())
            print(f"| {size} | {1e3 * memory:.0f} ms | {1e3 * file:.0f} ms | {file / memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
