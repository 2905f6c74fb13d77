"""What `lemoe eval` costs, in forward passes of the base over the same probes.

    python tests/benchmarks/evaluation.py               # 1,000 ZsRE edits
    python tests/benchmarks/evaluation.py --data counterfact_dev --edits 300

The reference runs every probe through the base model once, in full batches of similar length, the head at target
positions alone, with the same oneDNN matmul, in the same process; each is measured twice, in turn, and the faster one
counts. The adaptor holds all the edits and is trained for two steps only: how well it answers changes no cost. Reads
the real edits in ../shared/data.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import lemoe
from lemoe.base.frozen.replay import extract_hidden
from lemoe.base.hooks import removed_on_exit
from lemoe.base.matmul import use_onednn
from lemoe.base.tokens import Batch, Passage, encode_passages, length_buckets
from lemoe.evaluation.evaluate import list_probes

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
BATCH_TOKENS = 4096


def train_adaptor(base: lemoe.BaseModel, edits: list[lemoe.Edit]) -> lemoe.AdaptorState:
    """All edits, hardly trained, in rounds of 50."""
    settings = replace(lemoe.resolve_settings("anchor"), layer=len(base.layers) - 2, steps=2, retries=0)
    settings = replace(settings, variants=0, negatives=0)
    rounds = [lemoe.train_round(base, edits[first : first + 50], settings) for first in range(0, len(edits), 50)]
    return lemoe.stack(rounds)


def probe_passages(base: lemoe.BaseModel, edits: list[lemoe.Edit]) -> list[Passage]:
    """Every probe with the answer that its file names; where it names none, with its edit's target."""
    texts = [(edit.id, probe.prompt, probe.target or edit.target) for edit in edits for _, probe in list_probes(edit)]
    return encode_passages(base, texts)


@torch.no_grad()
def run_base(base: lemoe.BaseModel, passages: list[Passage]) -> None:
    """Every passage through the base model once."""
    seen: list[torch.Tensor] = []
    handle = base.layers[-1].register_forward_hook(lambda module, args, output: seen.append(extract_hidden(output)))
    with removed_on_exit([handle]), use_onednn(base.model):
        for rows in length_buckets([len(passage.input_ids) for passage in passages], BATCH_TOKENS):
            batch = Batch.from_passages(passages, rows, base.pad_token_id, base.device)
            base.decoder(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            for logits in base.logits_in_chunks(seen.pop()[batch.target_rows, batch.target_columns]):
                logits.argmax(-1)


def time_work(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="zsre_mend_edit")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--model", default="llama")
    given = parser.parse_args()
    base = lemoe.load_base(given.model)
    edits = lemoe.read_edits(DATA / f"{given.data}.json")[: given.edits]
    state = train_adaptor(base, edits)
    passages = probe_passages(base, edits)
    run_base(base, passages[:64])
    lemoe.evaluate(base, state, edits[:8], lemoe.EvalOptions(batch_tokens=BATCH_TOKENS))
    evaluations, references = [], []
    for _ in range(2):
        evaluations.append(
            time_work(lambda: lemoe.evaluate(base, state, edits, lemoe.EvalOptions(batch_tokens=BATCH_TOKENS)))
        )
        references.append(time_work(lambda: run_base(base, passages)))
    evaluation, reference = min(evaluations), min(references)
    print(f"{len(edits):,} edits, {len(passages):,} probes, {sum(len(p.input_ids) for p in passages):,} tokens")
    ratio = evaluation / reference
    print(f"evaluation {evaluation:.1f} s, base passes {reference:.1f} s, ratio {ratio:.2f} (threshold 1.50)")


if __name__ == "__main__":
    main()
