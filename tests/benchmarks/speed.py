"""Speed of the default preset: counted operations and bytes, and timings as ratios to references of the same run.

    python tests/benchmarks/speed.py count            # what an edit costs on paper
    python tests/benchmarks/speed.py training         # against a plain full-model loop over the same texts
    python tests/benchmarks/speed.py scale            # the cost of an edit among 200 and among 3,000
    python tests/benchmarks/speed.py routing          # the gate over 1,000 to 1,000,000 anchors
    python tests/benchmarks/speed.py crowd            # the gate over up to 4,000 edits of one subject
    python tests/benchmarks/speed.py reading          # bytes and tokens of sequences that are read on, in long contexts
    python tests/benchmarks/speed.py inference        # prefill and decode of an edited model against the base
    python tests/benchmarks/speed.py gpu              # a random model of the 7B shape, bfloat16, on a GPU

Reads the real edits in ../shared/data where they are there, else examples/edits.jsonl. Nothing here is part of the
test run.
"""

import argparse
import hashlib
import random
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy
import psutil
import torch
from synthetic import make_crowded_edits, make_renamed_edits
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import lemoe
from lemoe.adaptor.state import AdaptorState
from lemoe.base.frozen import residual_scale
from lemoe.base.frozen.layer_inputs import read_layer_inputs
from lemoe.base.hooks import added_to_residual
from lemoe.base.matmul import use_onednn
from lemoe.base.sources import ModelSource
from lemoe.base.structure import FFNSite
from lemoe.base.tensors import rms_normalise
from lemoe.base.tokens import Batch, Passage, encode_edits, length_buckets
from lemoe.data.edits import combine_digests
from lemoe.routing.anchor.anchors import Anchors, LiveAnchors
from lemoe.routing.anchor.fitting import fitted_meaning, layer_to_read
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.meaning import Vector
from lemoe.routing.anchor.route import GateState, Route
from lemoe.routing.router import Sequences
from lemoe.training.anchor.batches import PositiveBatch, TrainingBatchBuilder, TrainingBatches
from lemoe.training.anchor.round import MIN_WIDTH, TrainableExperts

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / ".." / "shared" / "data"
LOSS_WORDS = 2048  # token ids that take part in the loss, about
TOKENISED = 10_000  # texts that are tokenised together


def read_real_edits(count: int) -> list[lemoe.Edit]:
    """ZsRE edits, the first of each subject; the examples where the data is not there."""
    source = DATA / "zsre_dev.json"
    edits = lemoe.read_edits(source if source.exists() else REPOSITORY / "examples" / "edits.jsonl")
    first = {edit.subject: edit for edit in reversed(edits)}
    return list(reversed(first.values()))[:count]


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per second of a large matrix product."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: one @ other, repeats=5)


def median_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds, after one run to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Shape:
    """What the arithmetic depends on."""

    layers: int
    hidden: int
    intermediate: int
    key_width: int
    vocabulary: int

    @property
    def attention_parameters(self) -> int:
        return 2 * self.hidden * (self.hidden + self.key_width)

    @property
    def ffn_parameters(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        return self.attention_parameters + self.ffn_parameters

    def forward(self, tokens: float) -> float:
        """Operations of a whole forward pass with logits at every position."""
        return 2 * tokens * (self.layers * self.layer_parameters + self.hidden * self.vocabulary)

    def editing(self, columns: "Columns", layer: int, steps: int) -> tuple[float, float, float]:
        """Operations per edit: of the frozen passes, of replaying the layers above `layer`, of the loss.

        A step goes forward and back without gradients of weights. In the last layer the frozen pass stops at keys and
        values, and a replay runs the FFN at target positions alone.
        """
        read, above = layer_to_read(self.layers, layer), self.layers - 1 - layer
        whole, last, replayed = columns.frozen * self.layers + columns.read * read, 0.0, 0.0
        if above:
            whole -= columns.frozen
            last = 2 * self.hidden * self.key_width * columns.frozen
            replayed = columns.replayed * ((above - 1) * self.layer_parameters + self.attention_parameters)
            replayed += columns.predicted * self.ffn_parameters
        loss = columns.predicted * self.hidden * (steps * LOSS_WORDS * 2 + self.vocabulary)
        return 2 * (whole * self.layer_parameters + last), 4 * steps * replayed, 2 * loss


@dataclass(frozen=True)
class Columns:
    """Columns (padding included) per edit that run through the model: of its frozen pass, of the pass before that reads
    what its prompts mean, of each step's replay, and at which each step predicts a token.
    """

    frozen: float
    read: float
    replayed: float
    predicted: float


SHAPES = {
    "embedded, 135M": Shape(30, 576, 1536, 192, 49152),
    "7B": Shape(32, 4096, 11008, 4096, 32000),
}


def count_operations() -> None:
    """Operations and bytes of an edit, from the texts of one round of real edits."""
    base = lemoe.load_base("llama")
    settings = lemoe.resolve_settings("anchor")
    edits = read_real_edits(settings.round_size)
    layer = settings.resolve_layer(len(base.layers), base.source.layers)
    with count_columns(base, 0) as all_columns, count_columns(base, layer) as frozen:
        batches = make_batches(base, edits, settings)
    texts = [*batches.prompts, *(positive for kind in batches.paraphrases for positive in kind)]
    kinds = 1 + len(batches.paraphrases)
    tokens = sum(int(positive.frozen.batch.mask.sum()) for positive in batches.prompts) / len(edits)
    columns = Columns(
        frozen=sum(frozen) / len(edits),
        read=(sum(all_columns) - sum(frozen)) / len(edits),
        replayed=2 * sum(positive.active.numel() for positive in texts) / len(edits) / kinds,
        predicted=2 * sum(len(positive.weights) for positive in texts) / len(edits) / kinds,
    )
    print(
        f"An edit has {tokens:.1f} tokens of prompt and target. {columns.read:.0f} columns tell what its prompt means;"
    )
    print(f"its texts take {columns.frozen:.0f} columns of the frozen pass; each of {settings.steps} steps replays")
    print(f"{columns.replayed:.1f} and predicts {columns.predicted:.1f}.\n")
    print(
        "| shape | frozen | replays | loss | all | base forward pass | in passes | expert, float32 | expert, bfloat16 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        known = base.source.layers if shape.layers == len(base.layers) else {}
        parts = shape.editing(columns, settings.resolve_layer(shape.layers, known), settings.steps)
        forward, size = shape.forward(tokens), 3 * MIN_WIDTH * shape.hidden
        cells = " | ".join(f"{part / 1e9:.1f} GFLOP" for part in (*parts, sum(parts), forward))
        print(
            f"| {name} | {cells} | {sum(parts) / forward:.1f} | {4 * size / 1024:.0f} KiB | {2 * size / 1024:.0f} KiB |"
        )
    with FlopCounterMode(display=False) as counter:
        run_full_forward(base, edits)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        lemoe.train_round(base, edits, settings)
    edited = counter.get_total_flops()
    print(f"\nAs torch counts, attention, checks and retries included: {edited / len(edits) / 1e9:.1f} GFLOP an edit,")
    print(f"{edited / forward:.2f} times the {forward / len(edits) / 1e9:.2f} of a forward pass of the base.")


@contextmanager
def count_columns(base: lemoe.BaseModel, layer: int) -> Iterator[list[int]]:
    """Padded tokens that run through the FFN of `layer`, pass after pass, while open."""
    columns: list[int] = []
    site = base.ffn_site(layer)
    hook = site.entry.register_forward_pre_hook(lambda module, args: columns.append(args[0].numel() // site.hidden))
    try:
        yield columns
    finally:
        hook.remove()


def make_batches(base: lemoe.BaseModel, edits: Sequence[lemoe.Edit], settings: lemoe.Settings) -> TrainingBatches:
    layer = settings.resolve_layer(len(base.layers), base.source.layers)
    passages = encode_edits(base, edits)
    anchors = [Anchor(p.prompt, p.target, e.subject) for p, e in zip(passages, edits, strict=True)]
    builder = TrainingBatchBuilder(
        base,
        base.ffn_site(layer),
        layer,
        settings,
        edits,
        passages,
        anchors,
        random.Random(0),
        fitted_meaning(base, layer),
    )
    return builder.build()


def time_training() -> None:
    """Seconds per edit, against the base's forward pass and against plain training loops over the same texts."""
    base = lemoe.load_base("llama")
    settings = lemoe.resolve_settings("anchor")
    edits = read_real_edits(200)
    rounds = [edits[start : start + settings.round_size] for start in range(0, len(edits), settings.round_size)]
    rate = measure_matmul_rate(base.device, torch.float32)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    forward = median_seconds(lambda: run_full_forward(base, edits)) / len(edits)
    print(f"one base forward pass, full logits: {1e3 * forward:.1f} ms an edit")
    with use_onednn(base.model):
        fast = median_seconds(lambda: run_full_forward(base, edits)) / len(edits)
    print(f"the same with lemoe's matmul: {1e3 * fast:.1f} ms an edit")
    process = psutil.Process()
    resident = process.memory_info().rss
    peak = PeakMemory(process)
    started = time.perf_counter()
    with peak:
        states = [lemoe.train_round(base, members, settings) for members in rounds]
    ours = (time.perf_counter() - started) / len(edits)
    steps = statistics.mean(state.rounds[0].steps for state in states)
    print(
        f"lemoe: {1e3 * ours:.0f} ms an edit = {ours / forward:.1f} forward passes, or {ours / fast:.1f} with the same "
        f"matmul; {steps:.0f} steps a round"
    )
    print(f"peak memory above the loaded base: {(peak.bytes - resident) / 2**20:.0f} MiB")
    operations, seconds = measure_step_cost(base, rounds[0], replace(settings, retries=0))
    print(
        f"step loop: {operations / 1e9:.1f} GFLOP in {1e3 * seconds:.0f} ms a step of {len(rounds[0])} edits, "
        f"{operations / seconds / rate:.0%} of the rate of matrix products"
    )
    batches = make_batches(base, rounds[0], settings)
    for label, size in (("the same batch", settings.round_size), ("batch 1", 1)):
        plain = steps * time_plain_step(base, batches, settings, size)
        print(f"plain full-model loop, {label}: {1e3 * plain:.0f} ms an edit: {plain / ours:.1f} times slower")


def time_whole_runs() -> None:
    """Seconds per edit of whole runs, from planning to the stacked file, of few edits and of many; takes long."""
    base = lemoe.load_base("llama")
    edits = lemoe.read_edits(DATA / "zsre_dev.json")
    settings = lemoe.resolve_settings("anchor")
    print("| edits | training | with planning, stacking and measuring | all edits opened |\n|---|---|---|---|")
    for count in (200, len(edits)):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            report = lemoe.edit(base, edits[:count], folder, settings)
            whole = (time.perf_counter() - started) / report.taught
            opened = median_seconds(partial(lemoe.load_adaptor, report.path))
        taught, training = report.taught, report.seconds / report.taught
        row = f"| {taught:,} | {1e3 * training:.0f} ms an edit | {1e3 * whole:.0f} ms an edit | in {opened:.2f} s |"
        print(row, flush=True)


def measure_step_cost(
    base: lemoe.BaseModel, edits: Sequence[lemoe.Edit], settings: lemoe.Settings
) -> tuple[float, float]:
    """Operations and seconds of one step, a mean over the steps of a round, each in a run of its own."""
    with FlopCounterMode(display=False) as counter:
        operations: list[float] = []
        lemoe.train_round(base, edits, settings, on_step=lambda step: operations.append(counter.get_total_flops()))
    times: list[float] = []
    lemoe.train_round(base, edits, settings, on_step=lambda step: times.append(time.perf_counter()))
    steps = len(times) - 2  # the last of them is told at once
    return (operations[steps] - operations[0]) / steps, (times[steps] - times[0]) / steps


class PeakMemory:
    """Peak resident memory while open, sampled."""

    def __init__(self, process: psutil.Process):
        self._process, self.bytes, self._open = process, 0, False

    def __enter__(self) -> "PeakMemory":
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            time.sleep(0.01)


@torch.no_grad()
def run_full_forward(base: lemoe.BaseModel, edits: Sequence[lemoe.Edit]) -> None:
    texts = [Passage(passage.prompt + passage.target) for passage in encode_edits(base, edits)]
    for rows in length_buckets([len(text) for text in texts], 2048):
        batch = Batch.from_passages(texts, rows, base.pad_token_id, base.device)
        base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def time_plain_step(
    base: lemoe.BaseModel, batches: TrainingBatches, settings: lemoe.Settings, size: int, repeats: int = 3
) -> float:
    """Seconds per edit and step of a plain loop: whole model, full logits, same experts, prompts and one paraphrase."""
    layer = settings.resolve_layer(len(base.layers), base.source.layers)
    site = base.ffn_site(layer)
    chosen = [*batches.prompts, *batches.paraphrases[0]]
    edits = sum(len(positive.owners) for positive in batches.prompts)
    experts = TrainableExperts([MIN_WIDTH] * edits, site, residual_scale(base, layer), 0).to(base.device)
    optimiser = torch.optim.AdamW(experts.parameters(), lr=settings.learning_rate)
    rows = [(positive, row) for positive in chosen for row in range(len(positive.owners))]
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    parts = parts if size > 1 else parts[:: max(1, len(parts) // 12)]
    plain_batches = [PlainBatch.from_rows(part) for part in parts]

    def take_step() -> None:
        for batch in plain_batches:
            optimiser.zero_grad()
            plain_loss(base, site, experts, batch, settings.noise).backward()
            optimiser.step()

    return median_seconds(take_step, repeats) * (len(rows) / edits) / sum(map(len, parts))


@dataclass(frozen=True)
class PlainBatch:
    """Whole texts, right-padded: what a plain loop runs through the whole model.

    `ids`, `mask`, `active` (where the expert acts): `[batch, seq]`; `owners` `[batch]`; `targets` `[targets, 3]`: row,
    column and token.
    """

    ids: Tensor
    mask: Tensor
    active: Tensor
    owners: Tensor
    targets: Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[PositiveBatch, int]]) -> "PlainBatch":
        width = max(int(positive.frozen.batch.mask[row].sum()) for positive, row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, active = torch.zeros_like(ids), torch.zeros(len(rows), width)
        targets = []
        for index, (positive, row) in enumerate(rows):
            batch, start = positive.frozen.batch, positive.frozen.start
            length = int(batch.mask[row].sum())
            ids[index, :length], mask[index, :length] = batch.ids[row, :length], 1
            active[index, start:length] = positive.active[row, : length - start].float()
            mine = (batch.target_rows == row).nonzero().squeeze(1)
            columns, labels = batch.target_columns[mine], batch.labels[mine]
            targets.append(torch.stack([torch.full_like(columns, index), columns, labels], 1))
        owners = torch.stack([positive.owners[row] for positive, row in rows])
        return cls(ids, mask, active, owners, torch.cat(targets))


def plain_loss(
    base: lemoe.BaseModel, site: FFNSite, experts: TrainableExperts, batch: PlainBatch, noise: float
) -> Tensor:
    def compute_delta(inputs: Tensor) -> Tensor:
        normal = rms_normalise(inputs)
        normal = normal + noise * torch.randn_like(normal)
        return experts.scale * experts(normal, batch.owners) * batch.active.unsqueeze(-1)

    with added_to_residual(site, compute_delta):
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    row, column, label = batch.targets.unbind(1)
    return functional.cross_entropy(logits[row, column], label)


def synthetic_anchors(
    base: lemoe.BaseModel, edits: Sequence[lemoe.Edit], count: int, *, crowded: bool = False
) -> tuple[Anchors, list[list[int]]]:
    """Anchors of real questions about made-up names, and paraphrases of some of them as token ids."""
    made = list(make_renamed_edits(edits, count, crowded=crowded))
    asked = [edit.rephrases[0].prompt for edit in random.Random(0).sample(made, min(500, count))]
    return make_anchors(base, made), base.tokenizer(asked).input_ids


def make_anchors(base: lemoe.BaseModel, made: Sequence[lemoe.Edit]) -> Anchors:
    """The anchors of many edits, tokenised a part at a time, with made-up keys that vary as those of real questions."""
    meaning = fitted_meaning(base, len(base.layers) - 1)
    assert meaning is not None
    rng = numpy.random.default_rng(0)
    cohort = meaning.cohort.numpy()
    keys = cohort[rng.integers(len(cohort), size=len(made))] + rng.normal(size=(len(made), meaning.rank))
    prompts, targets = ([], [])
    for first in range(0, len(made), TOKENISED):
        few = made[first : first + TOKENISED]
        prompts += base.tokenizer([edit.prompt for edit in few]).input_ids
        targets += base.tokenizer([" " + edit.target for edit in few]).input_ids
    anchors = (
        Anchor(tuple(prompt), tuple(target), edit.subject)
        for edit, prompt, target in zip(made, prompts, targets, strict=True)
    )
    return Anchors.from_anchors(tuple(anchors), meaning, list(keys.astype(numpy.float32)[:, None]))


def read_states(base: lemoe.BaseModel, anchors: Anchors, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The hidden states `[seq, hidden]` of each prompt that the gate reads, which pass by in a model at work."""
    assert anchors.layer_read is not None
    return list(read_layer_inputs(base, anchors.layer_read, prompts, 4096))


def time_routing() -> None:
    """Milliseconds to route one prompt: paraphrases of stored edits, and unrelated questions."""
    base = lemoe.load_base("llama")
    edits = read_real_edits(2000)
    unrelated = base.tokenizer([probe.prompt for edit in edits for probe in edit.locality][:500]).input_ids
    settings = lemoe.resolve_settings("anchor")
    for crowded in (False, True):
        print(f"\nNames of {'the same few words, however many' if crowded else 'ever more words, as real ones'}:\n")
        print("| anchors | index built | its memory | in scope | out of scope |\n|---|---|---|---|---|")
        for count in (1_000, 10_000, 100_000) if crowded else (1_000, 10_000, 100_000, 1_000_000):
            anchors, asked = synthetic_anchors(base, edits, count, crowded=crowded)
            before, started = psutil.Process().memory_info().rss, time.perf_counter()
            live = anchors.to_live(base, settings)
            built, memory = time.perf_counter() - started, psutil.Process().memory_info().rss - before
            inside, outside = (
                median_seconds(partial(live.explain, prompts, read_states(base, anchors, prompts))) / len(prompts)
                for prompts in (asked, unrelated)
            )
            row = f"| {count:,} | {built:.1f} s | {memory / (1 << 20):.0f} MiB "
            print(f"{row}| {1e3 * inside:.3f} ms | {1e3 * outside:.3f} ms |", flush=True)


def time_crowded_subject() -> None:
    """CPU milliseconds to route a paraphrase among edits of one subject: met first, asked first, and asked again."""
    base = lemoe.load_base("llama")
    settings = lemoe.resolve_settings("anchor")
    print("| edits of one subject | first met | a new question | slowest | asked again |\n|---|---|---|---|---|")
    for count in (1, 100, 1_000, 4_000):
        made = make_crowded_edits(read_real_edits(3000), count)
        anchors = make_anchors(base, made)
        live = anchors.to_live(base, settings)
        asked = [edit.rephrases[0].prompt for edit in random.Random(0).sample(made, min(60, count))]
        prompts = base.tokenizer(["Who is Marie Curie?", *dict.fromkeys(asked)]).input_ids
        read = [[states] for states in read_states(base, anchors, prompts)]
        met = cpu_seconds(partial(live.explain, prompts[:1], read[0]))
        first, again = (
            [
                cpu_seconds(partial(live.explain, [prompt], states))
                for prompt, states in zip(prompts[1:], read[1:], strict=True)
            ]
            for _ in range(2)
        )
        row = f"| {count:,} | {1e3 * met:.0f} ms | {1e3 * statistics.median(first):.2f} ms "
        print(f"{row}| {1e3 * max(first):.2f} ms | {1e3 * statistics.median(again):.2f} ms |", flush=True)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of one run, in which the machine may do other things as well."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure_route_cache(context: int = 32_768) -> None:
    """What sequences that are read on keep beside the KV cache, and the tokens that a decoding step reads."""
    base = lemoe.load_base("llama")
    anchors, asked = synthetic_anchors(base, read_real_edits(2000), 1_000)
    settings = lemoe.resolve_settings("anchor")
    line_end = base.tokenizer("\n").input_ids
    text = [token for prompt in asked for token in (*prompt, *line_end)]
    ids = torch.tensor([(text * (context // len(text) + 1))[:context]])
    print("| sequences | context | steps | kept | tokens read a step |\n|---|---|---|---|---|")
    for batch, steps in ((1, 1_100), (1_024, 2), (1_100, 2)):
        kept, read = extend_sequences(anchors.to_live(base, settings), ids, batch, steps)
        row = f"| {batch:,} | {context:,} | {steps:,} | {kept / 2**20:.1f} MiB "
        print(f"{row}| {', '.join(f'{tokens:,}' for tokens in sorted(set(read)))} |", flush=True)


def extend_sequences(live: LiveAnchors, ids: Tensor, batch: int, steps: int) -> tuple[int, list[int]]:
    """Bytes kept, the KV cache left aside, of `batch` sequences that go on from one text, each its own way, by so many
    tokens; and the tokens that each step read.
    """
    tracemalloc.start()
    memory = route_tokens(live, ids, None).expand(batch, -1, -1)
    read = []
    for step in range(steps):
        with record_read_tokens() as tokens:
            new = route_tokens(live, (torch.arange(batch) + step).unsqueeze(1) % 20_000, memory)
        read.append(len(tokens))
        memory = torch.cat([memory, new], 1)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept, read


def route_tokens(live: LiveAnchors, ids: Tensor, memory: Tensor | None) -> Tensor:
    """What the KV cache holds of new tokens `[batch, seq]` behind others, in memory of torch, which is not traced."""
    known = torch.ones_like(ids, dtype=torch.bool)
    _, cells = live.route(Sequences(ids, None, known, known, memory))
    assert cells is not None
    return cells.clone()


@contextmanager
def record_read_tokens() -> Iterator[list[int]]:
    """The tokens that routes read, while open."""
    read: list[int] = []
    push = Route.push

    def record_push(route: Route, token: int, projected: Vector | None = None) -> GateState:
        read.append(token)
        return push(route, token, projected)

    with patch.object(Route, "push", record_push):
        yield read


def random_adaptor(base: lemoe.BaseModel, taught: AdaptorState, anchors: Anchors) -> AdaptorState:
    """The experts of `taught` over and over, with their targets, one for each of `anchors`, as one round."""
    count = len(anchors.anchors)
    copied = [index % len(taught.experts) for index in range(count)]
    assert isinstance(taught.router, Anchors)
    targets = [anchor.target for anchor in taught.router.anchors]
    stored = zip(anchors.anchors, copied, strict=True)
    anchors = replace(anchors, groups=tuple((replace(anchor, target=targets[index]),) for anchor, index in stored))
    names = tuple(f"made-{number}" for number in range(count))
    digests = tuple(hashlib.sha256(name.encode()).hexdigest() for name in names)
    record = replace(taught.rounds[0], experts=count, ids=names, prompts=names, targets=names, edits=digests)
    record = replace(record, edits_sha256=combine_digests(digests))
    return replace(taught, rounds=(record,), experts=taught.experts.select(copied), router=anchors)


def time_inference(device: str = "auto") -> None:
    """Prefill and decode of an edited model, as overhead over the base."""
    base = lemoe.load_base("llama", device=device)
    settings = lemoe.resolve_settings("anchor", None, {"variants": 0, "negatives": 0, "steps": 2, "retries": 0})
    edits = read_real_edits(2000)
    taught = lemoe.train_round(base, edits[:20], settings)
    unrelated = base.tokenizer([probe.prompt for edit in edits for probe in edit.locality][:64]).input_ids
    print("| adaptor | prompts | batch | prefill | decode |\n|---|---|---|---|---|")
    for count in (20, 1_000, 10_000):
        anchors, asked = synthetic_anchors(base, edits, count)
        state = random_adaptor(base, taught, anchors)
        for label, prompts in (("in scope", asked), ("out of scope", unrelated)):
            for size in (1, 32):
                ids = [prompt[-10:] for prompt in prompts if len(prompt) >= 10][:size]
                prefill, decode = measure_overhead(base, state, torch.tensor((ids * size)[:size], device=base.device))
                print(f"| {count:,} | {label} | {size} | {prefill:+.1%} | {decode:+.1%} |", flush=True)


def measure_overhead(base: lemoe.BaseModel, state: AdaptorState, ids: Tensor, tokens: int = 24) -> tuple[float, float]:
    """Extra time of prefill, and of decoding behind it, of the edited model; base and edited alternate."""
    options = {"do_sample": False, "pad_token_id": base.pad_token_id, "eos_token_id": None}
    adaptor = lemoe.insert(base, state)

    def time_generation(new: int) -> float:
        started = time.perf_counter()
        base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options)
        return time.perf_counter() - started

    times: dict[tuple[bool, int], list[float]] = {}
    with adaptor:
        for _ in range(7):
            for new in (1, tokens):
                times.setdefault((True, new), []).append(time_generation(new))
                with adaptor.bypassed():
                    times.setdefault((False, new), []).append(time_generation(new))
    best = {key: statistics.median(values) for key, values in times.items()}
    prefill = best[True, 1] / best[False, 1] - 1
    decode = (best[True, tokens] - best[True, 1]) / (best[False, tokens] - best[False, 1]) - 1
    return prefill, decode


def time_gpu_training(count: int = 400) -> None:
    """Edits per second and memory on a random Llama of the 7B shape."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    tokenizer = lemoe.load_base("llama", device="cpu").tokenizer
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    base = lemoe.BaseModel(model, tokenizer, ModelSource("random 7B", "random"))
    loaded = torch.cuda.memory_allocated()
    edits = read_real_edits(count)
    for size in (50, 200):
        settings = lemoe.resolve_settings("anchor", None, {"round_size": size, "batch_tokens": 16384, "retries": 0})
        lemoe.train_round(base, edits[:size], settings)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for start in range(0, count, size):
            lemoe.train_round(base, edits[start : start + size], settings)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated()
        print(
            f"{torch.cuda.get_device_name()}: rounds of {size}: {count / seconds:.1f} edits/s, "
            f"{peak / 2**30:.1f} GiB in all, {(peak - loaded) / 2**30:.1f} GiB above the base"
        )


def main() -> None:
    parts = {
        "count": count_operations,
        "training": time_training,
        "scale": time_whole_runs,
        "routing": time_routing,
        "crowd": time_crowded_subject,
        "reading": measure_route_cache,
        "inference": time_inference,
        "gpu": time_gpu_training,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)}; all but gpu by default")
    given = parser.parse_args()
    unknown = set(given.parts) - set(parts)
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    for name in given.parts or [name for name in parts if name != "gpu"]:
        print(f"\n## {name}\n")
        parts[name]()


if __name__ == "__main__":
    main()
