"""Servers under load: right answers, adaptors that are swapped, and tokens a second with and without edits.

    python tests/benchmarks/serving.py --model llama --adaptor examples/edits.lemoe/adaptor.safetensors
    python tests/benchmarks/serving.py --server vllm --adaptor examples/edits.lemoe/adaptor.safetensors
    python tests/benchmarks/serving.py --server vllm --edits 10000

Starts `lemoe serve`, or vLLM with a base and vLLM with the exported folder, sends mixed requests from many clients at
once (own prompts of edits, other questions, plain and as a conversation), and compares every answer: in scope with
`lemoe ask`, out of scope with the base. Then it reloads the adaptor under load (`lemoe serve` alone),
and times the same requests to base and adaptor in turn; with `--edits`, only that, of an adaptor of so many edits.
"""

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speed import make_anchors, random_adaptor, read_real_edits
from synthetic import make_renamed_edits

import lemoe
from lemoe.base.embedded import embedded_folder
from lemoe.exporting.folder import export_model

OTHERS = (
    "The capital of Portugal is",
    "Water boils at a temperature of",
    "Write one sentence about the sea.",
    "The opposite of hot is",
    "Who wrote Don Quixote?",
    "Name three colours.",
)
TOKENS = 24  # of an answer
SWAP_SECONDS = 0.5  # between two reloads


@dataclass(frozen=True)
class Asked:
    """A request: its path, what is asked, and whether the prompt is an edit's own."""

    chat: bool
    text: str
    own: bool

    def body(self, model: str) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": self.text}]} if self.chat else {"prompt": self.text}
        return {"model": model, "max_tokens": TOKENS, "temperature": 0, **asked}


@dataclass(frozen=True)
class Target:
    """A model of a running server."""

    address: str
    name: str


@contextmanager
def running_server(command: Sequence[str]) -> Iterator[str]:
    """The address of a server while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, address = subprocess.Popen([*command, "--port", str(port)]), f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("the server ended") from None
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@contextmanager
def lemoe_serve(model: str, adaptor: str, threads: int) -> Iterator[tuple[Target, Target]]:
    """Base and edited model of one `lemoe serve`."""
    command = [sys.executable, "-c", "from lemoe_cli.main import cli; cli()", "serve", "-m", model, "-q"]
    command += ["-a", f"edits={adaptor}", "--threads", str(threads), "--allow-updates"]
    with running_server(command) as address:
        yield Target(address, lemoe.load_base(model).source.name), Target(address, "edits")


@contextmanager
def vllm_serve(model: str, adaptor: str) -> Iterator[tuple[Target, Target]]:
    """The base in one vLLM, the exported folder in another."""
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    options = ["--dtype", "float32", "--max-model-len", "1024", "--disable-uvicorn-access-log"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        export_model(model, [adaptor], Path(folder) / "edited")
        base = str(embedded_folder()) if model == "llama" else model
        addresses = [
            running.enter_context(running_server([*vllm, served, "--served-model-name", name, *options]))
            for served, name in ((base, "base"), (str(Path(folder) / "edited"), "edits"))
        ]
        yield Target(addresses[0], "base"), Target(addresses[1], "edits")


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def send(target: Target, asked: Asked, **given: Any) -> tuple[str, int]:
    """The answer, and how many tokens it has."""
    path = "chat/completions" if asked.chat else "completions"
    answer = post(target.address, path, asked.body(target.name) | given)
    choice = answer["choices"][0]
    text = choice["message"]["content"] if asked.chat else choice["text"]
    return text.strip(), answer["usage"]["completion_tokens"]


def send_all(target: Target, requests: Sequence[Asked], clients: int, **given: Any) -> list[tuple[str, int]]:
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda asked: send(target, asked, **given), requests))


def ask_directly(model: str, adaptor: str, requests: Sequence[Asked]) -> dict[Asked, str]:
    """What `lemoe ask` gives for each request."""
    base = lemoe.load_base(model)
    answers: dict[Asked, str] = {}
    with lemoe.insert(base, adaptor) as edited:
        for chat in (False, True):
            chosen = [asked for asked in dict.fromkeys(requests) if asked.chat == chat]
            replies = lemoe.ask(base, [asked.text for asked in chosen], edited, chat=chat, max_new_tokens=TOKENS)
            answers |= {asked: reply.after or "" for asked, reply in zip(chosen, replies, strict=True)}
    return answers


def choose_requests(prompts: Sequence[str], count: int) -> list[Asked]:
    """Requests of which every second one is an edit's own prompt, and about half are conversations."""
    rng = random.Random(0)
    return [
        Asked(rng.random() < 0.5, rng.choice(prompts) if number % 2 else rng.choice(OTHERS), bool(number % 2))
        for number in range(count)
    ]


def grow_adaptor(model: str, count: int, path: Path) -> list[str]:
    """Write an adaptor of `count` edits of made-up names with untrained experts; returns their prompts."""
    base, edits = lemoe.load_base(model), read_real_edits(2000)
    few = lemoe.resolve_settings("anchor", None, {"variants": 0, "steps": 2, "retries": 0})
    taught = lemoe.train_round(base, edits[:20], few)
    made = list(make_renamed_edits(edits, count))
    lemoe.save_adaptor(random_adaptor(base, taught, make_anchors(base, made)), path)
    return [edit.prompt for edit in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=["lemoe", "vllm"], default="lemoe")
    parser.add_argument("--model", default="llama")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adaptor", help="whose answers are compared, and timed")
    what.add_argument("--edits", type=int, help="only time an adaptor of so many made-up edits")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--threads", type=int, default=4, help="of lemoe serve")
    given = parser.parse_args()
    serve = vllm_serve if given.server == "vllm" else partial(lemoe_serve, threads=given.threads)
    if given.edits:
        with tempfile.TemporaryDirectory() as folder:
            grown = Path(folder) / "grown.safetensors"
            requests = choose_requests(grow_adaptor(given.model, given.edits, grown), given.requests)
            with serve(given.model, str(grown)) as (base, edits):
                compare_speed(base, edits, requests, given.clients)
        return
    requests = choose_requests([e.prompt for e in lemoe.load_adaptor(given.adaptor).edits if e.prompt], given.requests)
    expected = ask_directly(given.model, given.adaptor, requests)
    with serve(given.model, given.adaptor) as (base, edits):
        count_wrong(base, edits, requests, expected, given.clients)
        if given.server == "lemoe":
            swap_under_load(edits, given.adaptor, requests, expected, given.clients)
        compare_speed(base, edits, requests, given.clients)


def count_wrong(
    base: Target, edits: Target, requests: Sequence[Asked], expected: dict[Asked, str], clients: int
) -> None:
    before = send_all(base, requests, clients)
    after = send_all(edits, requests, clients)
    wrong_in = sum(found != expected[asked] for asked, (found, _) in zip(requests, after, strict=True) if asked.own)
    wrong_out = sum(
        found != plain for asked, (found, _), (plain, _) in zip(requests, after, before, strict=True) if not asked.own
    )
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    print(
        f"{len(requests)} requests from {clients} clients at once: in scope {wrong_in} are not as `lemoe ask` answers,"
    )
    print(f"out of scope {wrong_out} are not as the base answers; {changed} answers are changed by edits", flush=True)


def swap_under_load(
    edits: Target, adaptor: str, requests: Sequence[Asked], expected: dict[Asked, str], clients: int
) -> None:
    """Reload the adaptor until all requests are answered."""
    with ThreadPoolExecutor(clients + 1) as pool:
        answers = [pool.submit(send, edits, asked) for asked in requests]
        swaps = 0
        while not all(answer.done() for answer in answers):
            post(edits.address, "load_adaptor", {"name": edits.name, "path": adaptor})
            swaps += 1
            time.sleep(SWAP_SECONDS)
        failed = sum(answer.exception() is not None for answer in answers)
        wrong = sum(
            answer.result()[0] != expected[asked]
            for asked, answer in zip(requests, answers, strict=True)
            if asked.own and answer.exception() is None
        )
    print(f"the adaptor was reloaded {swaps} times meanwhile: {failed} requests failed, {wrong} in scope were wrong")


def compare_speed(base: Target, edits: Target, requests: Sequence[Asked], clients: int, turns: int = 5) -> None:
    """Tokens a second of the same requests, with and without edits in turn; vLLM writes on behind end tokens."""
    given = {} if base.address == edits.address else {"ignore_eos": True}
    rates: dict[Target, list[float]] = {base: [], edits: []}
    for _ in range(turns):
        for target, seen in rates.items():
            started = time.perf_counter()
            written = sum(tokens for _, tokens in send_all(target, requests, clients, **given))
            seen.append(written / (time.perf_counter() - started))
    plain, edited = (statistics.median(seen) for seen in rates.values())
    pairs = [f"{1 - after / before:+.1%}" for before, after in zip(*rates.values(), strict=True)]
    print(f"tokens a second: {plain:.0f} without edits, {edited:.0f} with them; lost, pair by pair: {', '.join(pairs)}")


if __name__ == "__main__":
    main()
