"""`lemoe serve` under load: right answers, adaptors that are swapped, and tokens a second with and without edits.

    python tests/benchmarks/serving.py --model llama --adaptor examples/edits.lemoe/adaptor.safetensors

Starts the server, sends mixed requests from many clients at once (own prompts of edits, other questions, plain and as a
conversation), and compares every answer: in scope with `lemoe ask`, out of scope with the same server's base. Then it
reloads the adaptor under load, and times the same requests to base and adaptor in turn.
"""

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lemoe

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


@contextmanager
def running_server(model: str, adaptor: str, threads: int) -> Iterator[str]:
    """The address of a server while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from lemoe_cli.main import cli; cli()", "serve", "-m", model, "-q"]
    command += ["-a", f"edits={adaptor}", "--port", str(port), "--threads", str(threads), "--allow-updates"]
    server, address = subprocess.Popen(command), f"http://127.0.0.1:{port}"
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


def post(address: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def send(address: str, model: str, asked: Asked) -> tuple[str, int]:
    """The answer, and how many tokens it has."""
    answer = post(address, "chat/completions" if asked.chat else "completions", asked.body(model))
    choice = answer["choices"][0]
    text = choice["message"]["content"] if asked.chat else choice["text"]
    return text.strip(), answer["usage"]["completion_tokens"]


def send_all(address: str, model: str, requests: Sequence[Asked], clients: int) -> list[tuple[str, int]]:
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda asked: send(address, model, asked), requests))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--adaptor", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--threads", type=int, default=4)
    given = parser.parse_args()
    rng = random.Random(0)
    edits = lemoe.load_adaptor(given.adaptor).edits
    own = [edit.prompt for edit in edits if edit.prompt]
    requests = [
        Asked(rng.random() < 0.5, rng.choice(own) if number % 2 else rng.choice(OTHERS), bool(number % 2))
        for number in range(given.requests)
    ]
    expected = ask_directly(given.model, given.adaptor, requests)
    base_name = lemoe.load_base(given.model).source.name
    with running_server(given.model, given.adaptor, given.threads) as address:
        count_wrong(address, base_name, requests, expected, given.clients)
        swap_under_load(address, given.adaptor, requests, expected, given.clients)
        compare_speed(address, base_name, requests[: given.requests // 2], given.clients)


def count_wrong(
    address: str, base_name: str, requests: Sequence[Asked], expected: dict[Asked, str], clients: int
) -> None:
    before = send_all(address, base_name, requests, clients)
    after = send_all(address, "edits", requests, clients)
    wrong_in = sum(found != expected[asked] for asked, (found, _) in zip(requests, after, strict=True) if asked.own)
    wrong_out = sum(
        found != plain for asked, (found, _), (plain, _) in zip(requests, after, before, strict=True) if not asked.own
    )
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    print(
        f"{len(requests)} requests from {clients} clients at once: in scope {wrong_in} are not as `lemoe ask` answers,"
    )
    print(f"out of scope {wrong_out} are not as the base answers; {changed} answers are changed by edits")


def swap_under_load(
    address: str, adaptor: str, requests: Sequence[Asked], expected: dict[Asked, str], clients: int
) -> None:
    """Reload the adaptor until all requests are answered."""
    with ThreadPoolExecutor(clients + 1) as pool:
        answers = [pool.submit(send, address, "edits", asked) for asked in requests]
        swaps = 0
        while not all(answer.done() for answer in answers):
            post(address, "load_adaptor", {"name": "edits", "path": adaptor})
            swaps += 1
            time.sleep(SWAP_SECONDS)
        failed = sum(answer.exception() is not None for answer in answers)
        wrong = sum(
            answer.result()[0] != expected[asked]
            for asked, answer in zip(requests, answers, strict=True)
            if asked.own and answer.exception() is None
        )
    print(f"the adaptor was reloaded {swaps} times meanwhile: {failed} requests failed, {wrong} in scope were wrong")


def compare_speed(address: str, base_name: str, requests: Sequence[Asked], clients: int, turns: int = 3) -> None:
    """Tokens a second of the same requests, with and without edits in turn."""
    rates: dict[str, list[float]] = {base_name: [], "edits": []}
    for _ in range(turns):
        for model, seen in rates.items():
            started = time.perf_counter()
            written = sum(tokens for _, tokens in send_all(address, model, requests, clients))
            seen.append(written / (time.perf_counter() - started))
    plain, edited = (statistics.median(seen) for seen in rates.values())
    print(f"tokens a second: {plain:.0f} without edits, {edited:.0f} with them: {1 - edited / plain:+.1%} lost")


if __name__ == "__main__":
    main()
