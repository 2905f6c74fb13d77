"""Feed damaged and hostile files to all readers, and any text to the gate: only clear errors, never a wrong state.

    python tests/benchmarks/fuzz.py --cases 100000

Half the cases are adaptor files with bytes, metadata or the table of tensors changed; half are edit files. As many
again are settings and plans, and a tenth as many are edits of odd characters that go through the gate. A case fails if
anything but a LemoeError is raised, a state is read that is not the one that was written, or reading takes longer than
`SLOW` seconds. Ends non-zero if one does.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import FACTS, build_model

import lemoe
from lemoe.base.tokens import encode_passage
from lemoe.planning.plan_file import load_plan
from lemoe.routing.anchor.anchors import Anchors, build_gate
from lemoe.routing.anchor.gate import Anchor
from lemoe.routing.anchor.route import Route

SLOW = 5.0  # seconds
STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, 1e308, float("nan"), "", "\x1b[2J", "../../etc/passwd", "x" * 10_000, [], {}),
    *([[]], {"a": {"b": {}}}, "\ud800", [0] * 1000, "NaN", {"__metadata__": {}}),
)


def save_small_adaptor(folder: Path) -> Path:
    """An adaptor of a tiny random model."""
    base = lemoe.load_base(str(build_model(folder / "model", "llama")), device="cpu")
    edits = [lemoe.Edit(prompt, target, subject, id=f"e{n}") for n, (subject, prompt, target) in enumerate(FACTS[:3])]
    settings = lemoe.resolve_settings("anchor", None, {"layer": 1, "steps": 2, "variants": 1, "negatives": 1})
    path = folder / "adaptor.safetensors"
    lemoe.save_adaptor(lemoe.train_round(base, edits, settings), path)
    return path


def save_shared_adaptor(state: lemoe.AdaptorState, path: Path) -> Path:
    """The same with two of the three edits on one expert, as in a compacted round."""
    one, other, last = state.router.anchors  # type: ignore[attr-defined]
    record = replace(state.rounds[0], experts=2, compacted_from=state.rounds[0].id)
    experts, router = state.experts.select([0, 2]), Anchors(((one, other), (last,)))
    lemoe.save_adaptor(replace(state, rounds=(record,), experts=experts, router=router), path)
    return path


def damage_content(content: bytes, rng: random.Random) -> bytes:
    """An adaptor file with something changed."""
    kind = rng.randrange(4)
    if kind == 0:
        return _change_bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    if kind == 1:
        table = _change_value(table, rng)
    elif kind == 2:
        metadata = _change_value(json.loads(table["__metadata__"]["lemoe"]), rng)
        table["__metadata__"]["lemoe"] = json.dumps(metadata)
    else:
        one, other = rng.sample([name for name in table if name != "__metadata__"], 2)
        table[one], table[other] = table[other], table[one]
    text = json.dumps(table).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a piece cut out or put in, or the end cut off."""
    changed = bytearray(content)
    kind = rng.randrange(4)
    position = rng.randrange(len(changed))
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 20))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[position : position + rng.choice((1, 8, 1000))]
    elif kind == 2:
        changed[position:position] = rng.randbytes(rng.choice((1, 8, 1000)))
    else:
        del changed[position:]
    return bytes(changed)


def _change_value(value: Any, rng: random.Random) -> Any:
    """The value with something inside it missing, strange or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(4)
        if kind == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if kind == 1:
            return {**value, str(rng.choice(STRANGE))[:50]: rng.choice(STRANGE)}
        return {**value, key: _change_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], _change_value(value[index], rng), *value[index + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 8, -value, 2**40))
    return rng.choice(STRANGE)


SHAPES: tuple[dict[str, Any], ...] = (
    {"prompt": "The sky is", "target": "green", "subject": "sky", "rephrases": ["The sky looks"], "locality": []},
    {"src": "Who wrote it?", "alt": "Ann", "rephrase": "The writer?", "loc": "nq question: why", "loc_ans": "so"},
    {
        "requested_rewrite": {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "France"}},
        "paraphrase_prompts": ["Where is Rome?"],
        "neighborhood_prompts": ["Oslo is in"],
    },
    {"prompt": "A is", "target_new": "B", "portability": {"x": [{"prompt": "p", "ground_truth": [["t"]]}]}},
)


def random_edits_file(rng: random.Random) -> bytes:
    """An edit file of some shape, with something wrong."""
    records = [_change_value(rng.choice(SHAPES), rng) for _ in range(rng.randrange(1, 4))]
    text = json.dumps(records) if rng.random() < 0.5 else "\n".join(map(json.dumps, records))
    content = text.encode("utf-8", "surrogatepass")
    return _change_bytes(content, rng) if content and rng.random() < 0.3 else content


def fuzz_files(folder: Path, cases: int, seed: int) -> dict[str, int]:
    """How many cases were refused and how many read; raises AssertionError at the first that fails."""
    rng = random.Random(seed)
    ordinary = save_small_adaptor(folder)
    shared = save_shared_adaptor(lemoe.load_adaptor(ordinary), folder / "shared.safetensors")
    originals = [(path.read_bytes(), lemoe.load_adaptor(path)) for path in (ordinary, shared)]
    counts = {"adaptors refused": 0, "adaptors read": 0, "edits refused": 0, "edits read": 0}
    for number in range(cases):
        adaptor = number % 2 == 0
        content, state = originals[number // 2 % 2]
        path = folder / ("case.safetensors" if adaptor else "case.json")
        path.write_bytes(damage_content(content, rng) if adaptor else random_edits_file(rng))
        read: Callable[[Path], Any] = lemoe.load_adaptor if adaptor else lemoe.read_edits
        started = time.monotonic()
        try:
            found = read(path)
            outcome = "read"
            assert not adaptor or found == state, f"case {number}: a wrong state was read"
        except lemoe.LemoeError:
            outcome = "refused"
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - started < SLOW, f"case {number}: slow"
        counts[f"{'adaptors' if adaptor else 'edits'} {outcome}"] += 1
    return counts


YAMLS = (
    "preset: anchor\nsteps: 12\nlearning_rate: 1e-4\norder: planned\nlayer_path: null\ntrain_rephrases: false\n",
    "edits: e.jsonl\nrounds:\n- e0: A -> B\n  e1: C -> D\n- [e2]\n",
)
PIECES: tuple[str, ...] = (
    "[",
    "{",
    "&a ",
    "*a",
    "- ",
    ": ",
    "? ",
    "!!int ",
    "!!float ",
    "!!bool ",
    "!!timestamp ",
    '""',
    "<<: ",
    "|",
    "\n",
)
PIECES += (
    "9" * 5000,
    "0x" + "f" * 5000,
    "[" * 5000,
    "{a: " * 2000,
    "\t",
    "---\n",
    "%YAML 9.9\n",
    "2020-13-45",
    "\x00",
    "\ud800",
)


def random_yaml_file(rng: random.Random) -> bytes:
    """Settings or a plan, with pieces put in and taken out."""
    text = rng.choice(YAMLS)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        position = rng.randrange(len(text) + 1)
        text = (
            text[:position]
            + rng.choice((*PIECES, str(rng.choice(STRANGE))))
            + text[position + rng.choice((0, 0, 1, 6)) :]
        )
    content = text.encode("utf-8", "surrogatepass")
    return _change_bytes(content, rng) if rng.random() < 0.2 else content


def fuzz_yaml(folder: Path, cases: int, seed: int) -> dict[str, int]:
    """How many settings and plans were refused and how many read; raises AssertionError at the first that fails."""
    rng = random.Random(seed)
    edits = [lemoe.Edit(f"Prompt {number}", "target", id=f"e{number}") for number in range(3)]
    path = folder / "case.yaml"
    counts = {f"{kind} {outcome}": 0 for kind in ("settings", "plans") for outcome in ("refused", "read")}
    for number in range(cases):
        path.write_bytes(random_yaml_file(rng))
        kind = ("settings", "plans")[number % 2]
        started = time.monotonic()
        try:
            json.dumps(lemoe.resolve_settings(None, path).as_dict()) if kind == "settings" else load_plan(path, edits)
            outcome, said = "read", ""
        except lemoe.LemoeError as error:
            outcome, said = "refused", str(error)
        except Exception as error:
            raise AssertionError(f"YAML case {number}: {type(error).__name__}: {error}") from error
        assert len(said) < 100_000, f"YAML case {number}: {len(said):,} characters of complaint"
        assert time.monotonic() - started < SLOW, f"YAML case {number}: slow"
        counts[f"{kind} {outcome}"] += 1
    return counts


def odd_text(rng: random.Random) -> str:
    """A few words, signs, marks, emoji or characters of any kind."""
    kinds: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(("The Nile", "ada", "II", "42", "½", "Dr. J.", "İ", "ǅ", "ß", "東京", "ann's", "x" * 300)),
        lambda: rng.choice(("!!!", "🎻", "¿?", "\u0301", "…", "\u200d", "\n", " ", "<eos>", "\x00")),
        lambda: chr(rng.randrange(0x3000) if rng.random() < 0.5 else rng.randrange(0xE000, 0x110000)),
    )
    return "".join(rng.choice(kinds)() + rng.choice(("", " ")) for _ in range(rng.randrange(1, 5)))


def fuzz_gate(base: lemoe.BaseModel, cases: int, seed: int) -> dict[str, int]:
    """How many gates were built of odd edits and read odd texts; raises AssertionError at the first that fails."""
    rng = random.Random(seed)
    settings = lemoe.resolve_settings("anchor")
    counts = {"gates built": 0, "edits that the tokenizer refuses": 0}
    for number in range(cases):
        facts = [(rng.choice((None, odd_text(rng))), odd_text(rng), odd_text(rng)) for _ in range(rng.randrange(1, 5))]
        try:
            passages = [encode_passage(base, prompt, target) for _, prompt, target in facts]
        except ValueError:
            counts["edits that the tokenizer refuses"] += 1
            continue
        anchors = [Anchor(p.prompt, p.target, fact[0]) for p, fact in zip(passages, facts, strict=True)]
        try:
            gate = build_gate(base, anchors, settings)
            for text in (odd_text(rng), *(prompt for _, prompt, _ in facts), *(subject or "" for subject, *_ in facts)):
                route = Route(gate)
                for token in base.tokenizer(text).input_ids:
                    route.push(token)
        except Exception as error:
            raise AssertionError(f"gate {number} over {facts!r}: {type(error).__name__}: {error}") from error
        counts["gates built"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz_files(Path(folder), given.cases, given.seed)
        counts |= fuzz_yaml(Path(folder), given.cases, given.seed)
        base = lemoe.load_base(str(Path(folder) / "model"), device="cpu")
        counts |= fuzz_gate(base, given.cases // 10, given.seed)
    print(f"{given.cases:,} cases: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
